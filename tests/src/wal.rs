//! WAL as the decoder sees it, and as PostgreSQL's own programs do.

mod segments;
mod words;

pub use segments::{Decoded, Segments};
pub use words::Words;
