//! The format, held to its document and to what earlier versions wrote.
//!
//! `fixtures/v1` is a whole location, with the key that opens it. It was made once and is never made again: a change of
//! code that cannot read it is a change of the format.

#![allow(clippy::unwrap_used)]

mod contents;
mod document;
mod fixtures;
mod make;
mod reader;
