//! Connections to the other members, in etcd's own peer protocol over HTTP/1.1.
//!
//! * [`client`] asks other members: their lists, versions, hashes, leases.
//! * [`endpoints`] answers such questions.
//!
//! Not here: what messages mean (`raft`), how a database is made or installed (`snapshot`).

pub mod client;
pub mod endpoints;

use std::time::Instant;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::pb::raftpb;

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
    /// Takes a database in. Answers once raft has taken the message.
    fn receive(&self, message: raftpb::Message, database: Chunks) -> BoxFuture<'static, Result<(), String>>;
}

/// What the rest of the member asks about its connections.
pub trait Links: Send + Sync + 'static {
    /// Since when the member `id` has been connected without a break.
    fn connected_since(&self, id: u64) -> Option<Instant>;
}

/// A member without others.
pub struct NoLinks;

impl Links for NoLinks {
    fn connected_since(&self, _: u64) -> Option<Instant> {
        None
    }
}
