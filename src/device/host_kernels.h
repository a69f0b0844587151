// The host twins of the fused kernels, as plain functions (tests and the host device call them).
#pragma once

#include "device/device.h"

namespace tokendepot {

/// See ScatterWork. Does not look at `guarded`.
ScatterOutcome verify_and_scatter(const ScatterWork& work);
/// See GatherWork.
void gather_and_digest(const GatherWork& work);

}  // namespace tokendepot
