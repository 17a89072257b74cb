//! Between raft-rs's messages and ours. Wire and disk use ours; raft-rs's parser and encoder are never called.

use raft::eraftpb as rs;

use crate::pb::raftpb;

/// Entry types of the log.
pub const NORMAL: i32 = raftpb::EntryType::EntryNormal as i32;
pub const CONF_CHANGE: i32 = raftpb::EntryType::EntryConfChange as i32;

pub fn entry_to_pb(entry: &rs::Entry) -> raftpb::Entry {
    raftpb::Entry {
        r#type: match entry.entry_type {
            rs::EntryType::EntryNormal => None,
            rs::EntryType::EntryConfChange => Some(CONF_CHANGE),
            rs::EntryType::EntryConfChangeV2 => Some(raftpb::EntryType::EntryConfChangeV2 as i32),
        },
        term: Some(entry.term),
        index: Some(entry.index),
        data: (!entry.data.is_empty()).then(|| entry.data.clone()),
    }
}

/// `None` for an entry type that no member may write.
pub fn entry_from_pb(entry: &raftpb::Entry) -> Option<rs::Entry> {
    let entry_type = match entry.r#type.unwrap_or(NORMAL) {
        NORMAL => rs::EntryType::EntryNormal,
        CONF_CHANGE => rs::EntryType::EntryConfChange,
        _ => return None,
    };
    Some(rs::Entry {
        entry_type,
        term: entry.term.unwrap_or(0),
        index: entry.index.unwrap_or(0),
        data: entry.data.clone().unwrap_or_default(),
        ..Default::default()
    })
}

pub fn hard_state_to_pb(hs: &rs::HardState) -> raftpb::HardState {
    raftpb::HardState { term: Some(hs.term), vote: Some(hs.vote), commit: Some(hs.commit) }
}

pub fn hard_state_from_pb(hs: &raftpb::HardState) -> rs::HardState {
    rs::HardState {
        term: hs.term.unwrap_or(0),
        vote: hs.vote.unwrap_or(0),
        commit: hs.commit.unwrap_or(0),
        ..Default::default()
    }
}

pub fn conf_state_to_pb(cs: &rs::ConfState) -> raftpb::ConfState {
    raftpb::ConfState {
        voters: cs.voters.clone(),
        learners: cs.learners.clone(),
        voters_outgoing: cs.voters_outgoing.clone(),
        learners_next: cs.learners_next.clone(),
        auto_leave: Some(cs.auto_leave),
    }
}

/// The crate's number for a membership change, by name: 2 and 3 mean different things to the crate and to etcd.
/// `None`: no effect in raft (an update of URLs).
pub fn conf_change(kind: raftpb::ConfChangeType, node_id: u64) -> Option<rs::ConfChangeV2> {
    let change_type = match kind {
        raftpb::ConfChangeType::ConfChangeAddNode => rs::ConfChangeType::AddNode,
        raftpb::ConfChangeType::ConfChangeRemoveNode => rs::ConfChangeType::RemoveNode,
        raftpb::ConfChangeType::ConfChangeAddLearnerNode => rs::ConfChangeType::AddLearnerNode,
        raftpb::ConfChangeType::ConfChangeUpdateNode => return None,
    };
    let change = rs::ConfChangeSingle { change_type, node_id, ..Default::default() };
    Some(rs::ConfChangeV2 { changes: vec![change].into(), ..Default::default() })
}
