//! The raft actor: consensus around raft-rs. The only module that names the crate.
//!
//! Owns the raft-rs node, the in-memory log, the proposals that wait for their entry to commit.
//! Does not own: durability (`wal`), state (`apply`), connections (`peer`).
//!
//! Inbox: proposals and reads from RPC handlers, messages of other members. Each holds a permit of a gate, so the lane
//! cannot overflow; what waits longer than its deadline is told so at a tick. Control lane, drained first: ticks, what
//! the WAL made durable, membership changes apply has recorded, checkpoints, news of the connections.
//! Towards `wal` and `apply` it never waits. Without room at `wal` it takes no new Ready, so batches grow by themselves;
//! without room at `apply` committed entries stay here, and proposals wait.
//! A panic here ends the process.
//!
//! Invariants:
//! 1. Only entries that are committed and durable here go to apply, in index order, without gaps.
//! 2. Nothing beyond a membership change goes to apply until that change is in force in raft.
//! 3. Messages that promise durability leave after the WAL said so, and none of a term before its vote is durable.
//! 4. No context of a read is used twice.

mod actor;
#[cfg(test)]
mod cluster_tests;
mod convert;
mod core;
mod held;
mod lines;
mod log;
mod reads;
mod status;
#[cfg(test)]
mod tests;

use bytes::Bytes;

pub use actor::{RaftActor, Wiring};
pub use convert::{CONF_CHANGE, NORMAL};
pub use core::{Core, Options, Output, Recovered, Room};
pub use reads::ReadRequest;
pub use status::{Reading, Status};

use crate::{
    actor::{Inbox, Message, Permit, Sender},
    apply::{ConfChanged, Outcome, Reply, Ticket},
    pb::{raftpb, walpb},
};

/// A request to put into the log.
#[derive(Debug)]
pub struct Proposal {
    /// The encoded `InternalRaftRequest`, or the encoded `ConfChange` of a membership change.
    pub data: Bytes,
    pub conf_change: bool,
    /// The request's id as it stands in `data`: how the entry finds its ticket again.
    pub id: u64,
    /// Only for the log if this member still leads in this term; else it is refused.
    pub as_leader_of: Option<u64>,
    pub ticket: Ticket,
}

/// What raft works on.
#[derive(Debug)]
pub enum Input {
    Propose(Proposal),
    Read(ReadRequest),
    /// A message of another member, with its place among those that wait.
    Step(Box<raftpb::Message>, Permit),
}

impl Message for Input {
    const KINDS: &'static [&'static str] = &["propose", "read", "step"];

    fn kind(&self) -> usize {
        match self {
            Input::Propose(_) => 0,
            Input::Read(_) => 1,
            Input::Step(..) => 2,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Input::Propose(proposal) => proposal.data.len(),
            Input::Read(_) => size_of::<ReadRequest>(),
            Input::Step(message, _) => message_bytes(message),
        }
    }
}

/// What a message costs in memory, about.
pub fn message_bytes(message: &raftpb::Message) -> usize {
    let entry = |e: &raftpb::Entry| e.data.as_ref().map_or(0, Bytes::len) + size_of::<raftpb::Entry>();
    size_of::<raftpb::Message>() + message.entries.iter().map(entry).sum::<usize>()
}

/// A snapshot to take on: its store directory is complete, its record is in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Install {
    pub index: u64,
    pub term: u64,
}

/// What the rest of the process tells raft outside the data lane.
#[derive(Debug)]
pub enum Control {
    /// One tick of the raft clock; at most one is under way.
    Tick,
    /// Everything up to this Ready number is durable.
    Persisted(u64),
    /// The WAL failed; the process is about to end.
    LogFailed,
    /// apply has recorded a membership change.
    ConfChanged(ConfChanged),
    /// apply has taken on the snapshot at this index.
    Installed(u64),
    /// A leader's snapshot whose store directory is complete; told whether raft goes on from it.
    Snapshot(Box<raftpb::Message>, tokio::sync::oneshot::Sender<bool>),
    /// Appends to this member are lost.
    Unreachable(u64),
    /// What became of a snapshot for another member.
    SnapshotSent { to: u64, delivered: bool },
    /// The clock of a fresh member is put forward, so that the first election comes soon.
    AdvanceTicks(usize),
    /// The store is synced up to this index: the log below may go.
    Checkpoint { synced: u64 },
    /// The WAL has this snapshot record: memory below it may go.
    Compact(u64),
    /// Hand leadership over to this voter (0: the one that is best prepared). Refused silently if this member does not
    /// lead: who asks watches the status.
    Transfer { to: u64 },
    /// What raft knows of itself and the others.
    Inspect(tokio::sync::oneshot::Sender<Inspection>),
    /// Stop taking work, fail what waits, hand over what is ready, end; then tell.
    Stop(std::sync::mpsc::SyncSender<()>),
}

/// Raft's state in one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    pub id: u64,
    pub term: u64,
    pub vote: u64,
    pub commit: u64,
    /// 0: none known.
    pub leader: u64,
    pub role: &'static str,
    /// Who is to lead next; 0: nobody in particular.
    pub transferee: u64,
    /// Each member's place in the log, this one's included; empty unless this member leads.
    pub progress: Vec<Progress>,
}

/// How far another member's log has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub id: u64,
    pub matched: u64,
    pub next: u64,
    pub state: &'static str,
}

pub type RaftSender = Sender<Input, Control>;
pub type RaftInbox = Inbox<Input, Control>;

/// A log write for the WAL, in the order raft made them.
#[derive(Debug)]
pub struct Append {
    /// raft-rs's number of the Ready this belongs to.
    pub number: u64,
    /// A leader's snapshot that this log goes on from; goes before the entries.
    pub snapshot: Option<walpb::Snapshot>,
    pub entries: Vec<raftpb::Entry>,
    pub hard_state: Option<raftpb::HardState>,
    /// False if only the commit index moved.
    pub sync: bool,
}

/// A committed entry on its way to apply.
#[derive(Debug)]
pub struct Committed {
    pub index: u64,
    pub term: u64,
    pub conf_change: bool,
    pub data: Bytes,
    /// Who waits for it on this member.
    pub ticket: Option<Ticket>,
}

/// An answer raft itself gives.
pub type Answer = (Reply, Outcome);
