# The CUDA device: built where nvcc is found. The runtime is linked statically and finds the driver when it is first used, so
# the same build runs on hosts without a GPU.

set(TOKENDEPOT_HAS_CUDA FALSE)
if(NOT TOKENDEPOT_CUDA)
  message(STATUS "CUDA: off (TOKENDEPOT_CUDA is OFF)")
elseif(TOKENDEPOT_SANITIZE OR TOKENDEPOT_FUZZ)
  message(STATUS "CUDA: off (sanitizers and fuzzing are for host code)")
else()
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    # Ampere, Hopper, Blackwell; PTX for what comes later.
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 100-virtual)
  endif()
  # What is installed, or what scripts/setup brought.
  find_program(TOKENDEPOT_NVCC nvcc
    PATHS /usr/local/cuda/bin ${CMAKE_CURRENT_SOURCE_DIR}/.cache/cuda/nvidia/cu13/bin)
  if(TOKENDEPOT_NVCC AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER ${TOKENDEPOT_NVCC})
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(TOKENDEPOT_HAS_CUDA TRUE)
    message(STATUS "CUDA: on (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES})")
  else()
    message(STATUS "CUDA: off (no nvcc found)")
  endif()
endif()

function(tokendepot_add_cuda target)
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})  # cuFile is loaded at run time
  if(NOT TOKENDEPOT_HAS_CUDA)
    target_sources(${target} PRIVATE src/device/cuda/no_cuda.cc src/workload/cuda/no_cuda.cc)
    return()
  endif()
  # A target of its own: nvcc 13 stops at C++20, and CMake 3.25 does not know its flag for that.
  add_library(${target}_kernels OBJECT src/device/cuda/kernels.cu src/workload/cuda/stamp.cu)
  set_target_properties(${target}_kernels PROPERTIES CUDA_STANDARD_REQUIRED OFF POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target}_kernels PRIVATE -std=c++20)
  target_include_directories(${target}_kernels PRIVATE src)
  target_sources(${target} PRIVATE
    src/device/cuda/bounce.cc src/device/cuda/caches.cc src/device/cuda/copiers.cc src/device/cuda/cuda_device.cc
    src/device/cuda/flight.cc src/device/cuda/holdings.cc src/device/cuda/marks.cc src/device/cuda/registry.cc
    src/workload/cuda/cuda_link.cc src/workload/cuda/cuda_memory.cc
    $<TARGET_OBJECTS:${target}_kernels>)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()
