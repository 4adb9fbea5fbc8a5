//! Benchmarks: see `benches/` and the dated results in README.md.
