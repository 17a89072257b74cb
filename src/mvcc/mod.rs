//! The rules of the multi-version store: revisions, key index, views, transactions, compaction.
//!
//! No I/O but through [`crate::storage::Storage`], no clock, no threads, no locks. `apply` owns the one
//! [`store::Store`]; everyone else reads immutable [`view::View`]s.

pub mod change;
pub mod history;
pub mod index;
pub mod record;
pub mod revision;
pub mod view;

pub use revision::{KeyRange, Revision};
