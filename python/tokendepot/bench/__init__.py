"""The benchmarks behind the command line: traces, models of a cache, shapes of models. Nothing here is imported by an engine."""
