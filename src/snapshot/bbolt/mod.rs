//! The bbolt file format: what a backup and the body of a snapshot between members are made of.
//!
//! `format.rs` has the layouts, `writer.rs` makes a file in one pass as a stream, `reader.rs` checks and reads one
//! that may come from anywhere. Which buckets there are and what their rows mean is not known here; buckets in
//! buckets are not supported, because no such file has them.

mod format;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use self::format::{KEY_MAX, Layout, PAGE_SIZE};
pub use self::reader::{Reader, Source, Visitor};
pub use self::writer::{CHUNK, Writer};
