//! Who belongs to the cluster: ids, members, the cluster version, and how a new cluster begins.
//!
//! * [`Members`] is the replicated part, owned by apply and changed only by log entries.
//! * [`conf_change`] reads and writes what a membership change carries in its entry.
//! * [`bootstrap`] checks `--initial-cluster` and makes a founding member's first log entries.
//! * [`discovery`] and [`srv`] make such a list of what another cluster or the DNS says.
//! * [`reconfig`] says whether a change of the voters is safe enough to be tried.
//! * [`ids`] computes member, cluster and request ids.
//!
//! Not here: proposing, raft's own configuration, talking to other members.

pub mod bootstrap;
pub mod conf_change;
pub mod discovery;
pub mod ids;
mod json;
mod members;
pub mod reconfig;
pub mod srv;
#[cfg(test)]
mod tests;
pub mod v2_request;
mod version;

pub use conf_change::{Change, DecodeError};
pub use members::{Downgrade, Error, Member, Members, Refusal, members_from_json, members_to_json};
pub use version::Version;
