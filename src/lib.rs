#![doc = include_str!("ARCHITECTURE.md")]

pub mod actor;
pub mod api;
pub mod apply;
pub mod cluster;
pub mod config;
pub mod http;
pub mod lease;
pub mod mvcc;
pub mod pb;
pub mod raft;
pub mod server;
pub mod snapshot;
pub mod storage;
pub mod telemetry;
pub mod wal;
pub mod watch;
