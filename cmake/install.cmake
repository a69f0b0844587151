# `cmake --install` gives the static library, the public headers and a package for find_package(tokendepot).
# The native module of the Python package is its own install component: a wheel holds nothing else.

include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tokendepot)

install(TARGETS tokendepot EXPORT tokendepot ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/tokendepot DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT development FILES_MATCHING PATTERN "*.h")
install(EXPORT tokendepot NAMESPACE tokendepot:: FILE tokendepotTargets.cmake DESTINATION ${package_dir}
  COMPONENT development)

configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tokendepotConfig.cmake.in
  ${PROJECT_BINARY_DIR}/tokendepotConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tokendepotConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/tokendepotConfig.cmake ${PROJECT_BINARY_DIR}/tokendepotConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT development)
