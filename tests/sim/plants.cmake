# Bugs planted on purpose, to test the tests: each is one source file of the engine with one text replaced while
# it is built, in a program of its own, tokendepot_sim_NAME. The engine itself knows nothing of them.

# tokendepot_plant(NAME SEEDS HOW FILE OLD NEW [OLD NEW]...): caught within SEEDS lives by the verdict HOW. Each OLD
# must be in src/FILE exactly once, or the program does not compile and its message says so.
function(tokendepot_plant name seeds how file)
  set(source ${PROJECT_SOURCE_DIR}/src/${file})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source})
  file(READ ${source} text)
  set(planted ${CMAKE_CURRENT_BINARY_DIR}/plants/${name}.cc)
  # By number: a text may hold semicolons, which a list would be cut at.
  math(EXPR last_argument "${ARGC} - 1")
  foreach(old_at RANGE 4 ${last_argument} 2)
    math(EXPR new_at "${old_at} + 1")
    string(FIND "${text}" "${ARGV${old_at}}" first)
    string(FIND "${text}" "${ARGV${old_at}}" last REVERSE)
    if(first EQUAL -1 OR NOT first EQUAL last)
      set(text "#error \"planted bug ${name}: a text that it replaces is not in src/${file} exactly once; see tests/sim/plants.cmake\"\n")
      break()
    endif()
    string(REPLACE "${ARGV${old_at}}" "${ARGV${new_at}}" text "${text}")
  endforeach()
  file(CONFIGURE OUTPUT ${planted} CONTENT "@text@" @ONLY)
  # Linked before the library, whose own copy of the file is then not wanted.
  tokendepot_simulation(tokendepot_sim_${name} ${planted})
  add_test(NAME planted_bug_${name}_is_caught COMMAND tokendepot_sim_${name} --seeds ${seeds})
  set_tests_properties(planted_bug_${name}_is_caught PROPERTIES
    PASS_REGULAR_EXPRESSION "seed [0-9]+: ${how}: " TIMEOUT 600)
endfunction()

tokendepot_plant(skip_digest 60 "wrong bytes" device/host_kernels.cc
  [[if (digest != work.header->shard_digests[work.first_shard + i]) return false;]]
  [[(void)digest;]])

tokendepot_plant(ignore_place 800 "wrong bytes" transfer/load.cc
  [[if (!at_home) {]]
  [[if (false && !at_home) {]])

tokendepot_plant(journal_before_bytes 100 "acknowledged lost" transfer/store.cc
  [[  task.pieces_left = static_cast<uint32_t>(task.pieces.size());
  // The last]]
  [[  task.pieces_left = static_cast<uint32_t>(task.pieces.size());
  Record early;
  early.kind = task.header.kind;
  early.key = task.header.key;
  early.ns_prefix = prefix_of(task.header.ns);
  early.part = task.header.part;
  early.tokens = task.header.tokens;
  (void)task.writer->acknowledge(task.place, early);
  // The last]])

tokendepot_plant(answer_before_journal 30 "acknowledged lost" transfer/store.cc
  [[if (auto known = task.writer->acknowledge(task.place, put); !known) {]]
  [[if (auto known = Status(); !known) {]])

tokendepot_plant(swallow_short_write 150 "(acknowledged lost|broken)" io/thread_engine.cc
  [[moved += static_cast<uint32_t>(result);]]
  [[moved += operation.write ? operation.bytes - moved : static_cast<uint32_t>(result);]])

tokendepot_plant(forget_failed_transfer 150 "hang" io/thread_engine.cc
  [[operation->done(operation, transfer(*operation));]]
  [[if (const int error = transfer(*operation); error != EIO) operation->done(operation, error);]])

tokendepot_plant(take_a_live_journal 30 "acknowledged lost" store/journal_file.cc
  [[if (!*locked) return std::optional<JournalWriter>();]]
  [[]])

tokendepot_plant(stop_at_a_bad_record 150 "acknowledged lost" store/journal_file.cc
  [[        ++pending_bad;
        continue;]]
  [[        ++pending_bad;
        has_tail_ = true;
        return good;]])

tokendepot_plant(trust_any_record 600 "(acknowledged lost|hang|broken)" format/journal.cc
  [[if (stored != digest) {]]
  [[if (false && stored != digest) {]])

tokendepot_plant(forget_to_seal 30 "(broken|hang)" store/root_writer.cc
  [[if (current_) records[count++] = seal_of(*current_);]]
  [[if (current_) {
      records[count] = seal_of(*current_);
      records[count++].type = RecordType::touch;
    }]])

tokendepot_plant(exceed_capacity 30 "capacity" store/eviction.cc
  [[const bool capacity_is_short = bytes > root_.capacity() || used > root_.capacity() - bytes;]]
  [[const bool capacity_is_short = bytes > root_.capacity();]])

tokendepot_plant(make_a_file_without_a_note 60 "capacity" store/segment_inventory.cc
  [[const auto told = keeper.note(note);]]
  [[const auto told = note.bytes > 0 ? Status() : keeper.note(note);]])

tokendepot_plant(reuse_a_segment_id 30 "(hang|acknowledged lost|capacity)" store/root_writer.cc
  [[return {journal_.writer(), next_sequence_++};]]
  [[return {journal_.writer(), next_sequence_++ % 4};]])

tokendepot_plant(remove_before_the_grace 400 "acknowledged lost" store/condemned_files.cc
  [[if (!at_once && now - at->second.since_ns < grace_ns_) continue;]]
  [[]])

tokendepot_plant(reuse_a_leased_segment 200 "broken" store/eviction.cc
  [[!segment.roots[root_.index()].sealed || segment.in_use > 0]]
  [[!segment.roots[root_.index()].sealed]]
  [[now.in_use > 0 || now.roots]]
  [[now.roots]]
  [[return slot && segments_.get(*slot).in_use > 0;]]
  [[(void)slot;
    return false;]])
