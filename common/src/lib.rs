//! The repository contract of Backstay: what both programs must agree on.

pub mod error;
pub mod id;
pub mod lsn;
pub mod name;
pub mod segment;

pub use error::{Context, Error, Kind, Result};
