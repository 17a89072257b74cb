//! The rules of the multi-version store: revisions, key index, views, transactions, compaction.
//!
//! No I/O but through [`crate::storage::Storage`], no clock, no threads, no locks. `apply` owns the one
//! [`store::Store`]; everyone else reads immutable [`view::View`]s.

pub mod auto_compaction;
pub mod change;
pub mod error;
pub mod hash;
#[cfg(test)]
mod hash_tests;
pub mod history;
pub mod index;
#[cfg(test)]
mod model_tests;
pub mod range;
pub mod record;
pub mod replay;
pub mod revision;
pub mod store;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod test_support;
pub mod txn;
pub mod view;

pub use error::Error;
pub use revision::{KeyRange, Revision};
pub use store::{Leases, Store};
pub use view::View;
