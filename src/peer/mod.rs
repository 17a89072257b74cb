//! Connections to the other members, in etcd's own peer protocol over HTTP/1.1.
//!
//! * [`transport`] knows the other members and passes raft's messages to their actors; [`actor`] is such an actor.
//! * [`reader`] dials and reads streams, [`stream`] writes those dialled by others, [`post`] sends what goes on no stream.
//! * [`listener`] is the peer port, [`accept`] answers there; [`codec`] knows the bytes, [`wire`] the headers.
//! * [`client`] asks other members: their lists, versions, hashes, leases.
//! * [`endpoints`] answers such questions.
//!
//! Not here: what messages mean (`raft`), how a database is made or installed (`snapshot`).

mod accept;
mod actor;
pub mod client;
pub mod codec;
pub mod dial;
pub mod endpoints;
pub mod listener;
pub mod metrics;
mod post;
mod probe;
mod reader;
mod status;
mod stream;
#[cfg(test)]
mod tests;
pub mod transport;
mod wire;

pub use accept::Body;
pub use listener::{Bound, Handler, Listening};
pub use transport::{Transport, Wiring};

use std::time::Instant;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::{pb::raftpb, telemetry::Text};

/// Header that names the cluster, in requests and in answers.
pub const CLUSTER_ID: &str = "x-etcd-cluster-id";

/// What arrives from other members, and what becomes of what was sent. No call waits.
pub trait Incoming: Send + Sync + 'static {
    /// For raft; dropped and counted when raft has no room.
    fn message(&self, message: raftpb::Message);
    /// Appends to this member are lost at the moment.
    fn unreachable(&self, id: u64);
    /// What became of the last snapshot for this member.
    fn snapshot_sent(&self, to: u64, delivered: bool);
    /// A member that was removed is refused for good.
    fn is_removed(&self, id: u64) -> bool;
    /// Another member says that this one has been removed from the cluster.
    fn removed_here(&self);
}

/// A database on its way in or out: chunks in order. Bounded: the maker waits for the taker.
pub type Chunks = tokio::sync::mpsc::Receiver<std::io::Result<Bytes>>;

/// Databases for members that are too far behind.
pub trait Databases: Send + Sync + 'static {
    /// The database to send behind `order` (a MsgSnap), and the message to send before it: the same with the index, term and
    /// membership of that database.
    fn open(&self, order: raftpb::Message) -> BoxFuture<'static, std::io::Result<(raftpb::Message, Chunks)>>;
    /// Takes a database in. Answers once raft has taken the message; an error is the text for the sender.
    fn receive(&self, message: raftpb::Message, database: Chunks) -> BoxFuture<'static, Result<(), String>>;
}

/// What the rest of the member asks about its connections.
pub trait Links: Send + Sync + 'static {
    /// Since when the member `id` has been connected without a break.
    fn connected_since(&self, id: u64) -> Option<Instant>;
    /// Appends what `/metrics` says of them.
    fn render_metrics(&self, out: &mut Text);
}

/// Bytes a message keeps in memory beside its own size.
fn size_of(message: &raftpb::Message) -> usize {
    let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let entries: usize = message.entries.iter().map(|e| length(&e.data) + std::mem::size_of::<raftpb::Entry>()).sum();
    entries + length(&message.context) + message.snapshot.as_ref().map_or(0, |s| length(&s.data))
}
