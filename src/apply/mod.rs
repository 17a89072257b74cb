//! The applier: committed entries to state, one at a time, in order.
//!
//! Owns the store, the leases, alarms and membership, and all writes to storage. Knows no sockets and no raft-rs.
//!
//! Inbox: committed entries from raft, bounded in bytes; past the bound raft hands out nothing more and proposals wait.
//! For each turn: validate and apply every entry, commit one storage batch that also holds the applied index and term,
//! publish one view, send the answers (one message per RPC runtime), hand the changes to the watch hubs.
//! An answer never precedes its view; a view never precedes its batch. A panic or a storage failure here ends the
//! process.
//!
//! Invariants: deterministic (no clock, no randomness, no hash order, no local setting decides a result); idempotent by
//! index; an entry this binary does not know ends the process and is never skipped.

mod actor;
mod alarms;
mod core;
mod decode;
mod error;
#[cfg(test)]
mod tests;
mod ticket;
mod view;

pub use actor::{ApplyActor, CleanUp, Hub, Wiring};
pub use alarms::Alarms;
pub use core::{APPLIED_INDEX_KEY, APPLIED_TERM_KEY, Core, LeaseNotice, Settings, read_number};
pub use error::Error;
pub use ticket::{Batch, Deliveries, Outcome, Replies, Reply, Ticket};
pub use view::{View, ViewCell};

use crate::{
    actor::{Inbox, Message, Sender},
    cluster::Members,
    mvcc::hash::HashKv,
    pb::{etcdserverpb as pb, raftpb::ConfChangeType},
    raft::{Answer, Committed, Install},
};

/// Whether a log entry's request can be read, as this or an older member wrote it.
pub fn is_readable(data: &bytes::Bytes) -> bool {
    decode::request(data).is_ok() || crate::cluster::v2_request::read(data).is_ok()
}

/// Committed entries, ascending and without gaps.
#[derive(Debug)]
pub struct Work {
    pub entries: Vec<Committed>,
}

impl Message for Work {
    const KINDS: &'static [&'static str] = &["committed"];

    fn bytes(&self) -> usize {
        self.entries.iter().map(|e| e.data.len() + size_of::<Committed>()).sum()
    }
}

#[derive(Debug)]
pub enum Control {
    /// Delete everything a compaction has condemned, then tell.
    Defragment(tokio::sync::oneshot::Sender<()>),
    /// Go on from this snapshot, whose store directory is complete.
    Install(Install),
    /// What came of the job handed to [`Wiring::hash`].
    Hashed(Option<HashKv>),
    /// Finish the batch in hand and end.
    Stop(std::sync::mpsc::SyncSender<()>),
}

pub type ApplySender = Sender<Work, Control>;
pub type ApplyInbox = Inbox<Work, Control>;

/// What a replicated request answers. Headers hold the revision; the handler adds who answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    LeaseGrant(pb::LeaseGrantResponse),
    LeaseRevoke(pb::LeaseRevokeResponse),
    Alarm(pb::AlarmResponse),
    /// The members after a change of the membership.
    Members(Members),
    /// Not applied but asked of raft: a linearizable read may answer once this index is applied.
    ReadIndex(u64),
    /// Applied; nothing to tell.
    Done,
}

/// A membership change as recorded, for raft to put in force and to answer.
#[derive(Debug)]
pub struct ConfChanged {
    pub index: u64,
    /// `None`: refused, no effect.
    pub change: Option<(ConfChangeType, u64)>,
    pub answer: Option<Answer>,
}
