//! Tests of the log, and what they share.

mod crash;
mod damage;
mod faults;
mod files;
mod rules;

use std::path::Path;

use bytes::Bytes;

use super::{sim::SimDisk, *};

pub(super) fn entry(term: u64, index: u64, data: &[u8]) -> raftpb::Entry {
    raftpb::Entry {
        r#type: None,
        term: Some(term),
        index: Some(index),
        data: (!data.is_empty()).then(|| Bytes::copy_from_slice(data)),
    }
}

pub(super) fn state(term: u64, vote: u64, commit: u64) -> raftpb::HardState {
    raftpb::HardState { term: Some(term), vote: Some(vote), commit: Some(commit) }
}

pub(super) fn snapshot(index: u64, term: u64) -> walpb::Snapshot {
    let conf_state = raftpb::ConfState { voters: vec![7], auto_leave: Some(false), ..Default::default() };
    walpb::Snapshot { index: Some(index), term: Some(term), conf_state: Some(conf_state) }
}

pub(super) fn metadata() -> Metadata {
    Metadata { node_id: Some(0x8e9e_05c5_2164_694d), cluster_id: Some(0xcdf8_18b4_3912_7c2e) }
}

pub(super) fn dir() -> &'static Path {
    Path::new("/member/wal")
}

/// Options for a log with small segments on the disk.
pub(super) fn small(disk: &SimDisk) -> Options {
    Options { segment_bytes: 1000, disk: Arc::new(disk.clone()), ..Options::new(dir()) }
}

/// Names of the segments, in order.
pub(super) fn segment_names(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.list(dir()).unwrap();
    names.retain(|name| name.ends_with(".wal"));
    names.sort();
    names
}

pub(super) fn read_segment(disk: &SimDisk, name: &str) -> Vec<u8> {
    disk.read(&dir().join(name)).unwrap()
}

/// A disk that holds these segments and no more.
pub(super) fn disk_with(segments: &[(String, Vec<u8>)]) -> SimDisk {
    let disk = SimDisk::default();
    disk.create_dir(dir()).unwrap();
    for (name, bytes) in segments {
        disk.write(&dir().join(name), bytes).unwrap();
    }
    disk
}
