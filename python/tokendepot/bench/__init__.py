"""The benchmarks behind the command line: traces, models of caches, shapes of models. Engines import nothing from here."""
