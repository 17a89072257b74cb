//! Leases: which exist, which keys hang on them, and, on the leader, when they end.
//!
//! * [`Leases`] is the replicated part, owned by apply and changed only by log entries. Its [`LeaseSet`] goes into
//!   every published view.
//! * [`Expirer`] is the leader's part: deadlines, renewal, the order and pace of expiry, checkpoints. It decides
//!   nothing alone: what it hands out becomes a proposal, and apply's notice of the revocation closes the matter.
//!
//! Not here: proposing, confirming leadership before a revoke or a renewal, forwarding to the leader, reading a
//! clock. Those are the shell's; here time is a parameter.

pub mod actor;
mod checkpoints;
mod expirer;
mod set;
mod state;
#[cfg(test)]
mod tests;

pub use checkpoints::INTERVAL_MS as CHECKPOINT_INTERVAL_MS;
pub use expirer::{Expirer, REVOKING_MAX, Renewal};
pub use set::LeaseSet;
pub use state::{Error, Leases};

/// The largest time to live, in seconds.
pub const TTL_MAX: i64 = 9_000_000_000;

/// The smallest time to live in seconds: one and a half election timeouts, so that a lease outlives an election.
pub fn min_ttl(election_ticks: u64, heartbeat_ms: u64) -> i64 {
    let millis = (3 * election_ticks / 2).saturating_mul(heartbeat_ms);
    i64::try_from(millis.div_ceil(1000)).unwrap_or(TTL_MAX)
}
