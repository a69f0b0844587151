# Warnings for our own targets, and the sanitizer and fuzzing modes, which apply to everything in the tree.

function(tokendepot_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow>)
endfunction()

if(TOKENDEPOT_SANITIZE)
  if(TOKENDEPOT_SANITIZE STREQUAL "thread")
    set(sanitizers -fsanitize=thread)
  elseif(TOKENDEPOT_SANITIZE STREQUAL "ON")
    set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
  else()
    message(FATAL_ERROR "TOKENDEPOT_SANITIZE is \"${TOKENDEPOT_SANITIZE}\", expected ON, thread or OFF")
  endif()
  add_compile_options(${sanitizers} -fno-omit-frame-pointer)
  add_link_options(${sanitizers})
endif()

if(TOKENDEPOT_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "TOKENDEPOT_FUZZ needs clang++ (libFuzzer), not ${CMAKE_CXX_COMPILER_ID}")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

# Parsing the same headers again and again was half of the time that a sanitized build took. The other builds, and clang-tidy
# over them, show that each file includes what it uses.
function(tokendepot_precompile target)
  if(TOKENDEPOT_SANITIZE)
    target_precompile_headers(${target} PRIVATE
      <algorithm> <array> <atomic> <chrono> <condition_variable> <cstring> <filesystem> <functional> <map> <memory> <mutex>
      <optional> <random> <set> <span> <string> <thread> <unordered_map> <vector> <fmt/format.h> <nlohmann/json.hpp> ${ARGN})
    if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
      # A compiler cache may bring them back beside a list of headers that was written later.
      target_compile_options(${target} PRIVATE "SHELL:-Xclang -fno-pch-timestamp")
    endif()
  endif()
endfunction()
