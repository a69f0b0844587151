# Runs `program` on a fresh root.
file(REMOVE_RECURSE ${root})
execute_process(COMMAND ${program} ${root} COMMAND_ERROR_IS_FATAL ANY)
file(REMOVE_RECURSE ${root})
