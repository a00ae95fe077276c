"""Plug-ins: objects that a config holds, and the seams that they fit.

There is no registry: write an object with the right verbs in your config file, and pass it.

- Where rows come from: `read()` yields (place, row). See `plugins.data.Source`; `plugins.data.sources` has the examples.
- How a row becomes tokens and labels: a callable (row, tokenizer) -> Example | Pair | None. See
  `plugins.data.DataProcessor`.
- What generates text: a spec whose `start(source, cpus)` returns an Engine. See `plugins.engines`.
- What makes embeddings: a spec whose `start_embedder(source, cpus, gpus)` returns an EmbeddingEngine.

A plug-in travels to Ray workers and replicas by pickle: keep it light, hold plain values, and import heavy libraries in
the function that needs them. A class that a config file defines itself travels by value, with the config. Specs that
check their fields are made with `plugins.spec`.
"""
