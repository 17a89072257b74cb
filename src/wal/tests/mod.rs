//! Tests of the log, and what they share.

mod files;

use std::path::Path;

use bytes::Bytes;

use super::*;

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

/// Options for a log with small segments.
pub(super) fn small(dir: &Path) -> Options {
    Options { segment_bytes: 1000, ..Options::new(dir) }
}
