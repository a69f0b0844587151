# Installs the build tree into an empty prefix, builds the consumer against that prefix alone and runs it.
# -D build_dir=... -D generator=... -D compiler=...
set(work ${build_dir}/consumer)
file(REMOVE_RECURSE ${work})
set(step COMMAND_ERROR_IS_FATAL ANY)

execute_process(COMMAND ${CMAKE_COMMAND} --install ${build_dir} --prefix ${work}/prefix --component development
  OUTPUT_QUIET ${step})
file(GLOB installed RELATIVE ${work}/prefix/include ${work}/prefix/include/*)
if(NOT installed STREQUAL "tokendepot")
  message(FATAL_ERROR "include/ of the installed tree holds '${installed}', expected only 'tokendepot'")
endif()
execute_process(COMMAND ${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work}/build -G ${generator}
  -D CMAKE_CXX_COMPILER=${compiler} -D CMAKE_PREFIX_PATH=${work}/prefix ${step})
execute_process(COMMAND ${CMAKE_COMMAND} --build ${work}/build ${step})
execute_process(COMMAND ${work}/build/consumer ${work}/root ${step})
