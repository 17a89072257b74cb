//! Between raft-rs's messages and ours. Wire and disk use ours; raft-rs's parser and encoder are never called.

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::{self as rs, MessageType};

use crate::pb::{etcdserverpb::RequestHeader, raftpb};

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

pub fn conf_state_from_pb(cs: &raftpb::ConfState) -> rs::ConfState {
    rs::ConfState { voters: cs.voters.clone(), learners: cs.learners.clone(), ..Default::default() }
}

/// A message to another member. `None`: of a kind that stays here.
pub fn message_to_pb(message: rs::Message) -> Option<raftpb::Message> {
    let set = |n: u64| (n != 0).then_some(n);
    let rs::Message { msg_type, to, from, term, log_term, index, entries, commit, snapshot, .. } = message;
    let number = message_type_to_pb(msg_type)?;
    let snapshot = snapshot.into_option().map(|snapshot| {
        let meta = snapshot.metadata.unwrap_or_default();
        let conf_state = meta.conf_state.as_ref().map(conf_state_to_pb);
        let metadata = raftpb::SnapshotMetadata { conf_state, index: Some(meta.index), term: Some(meta.term) };
        raftpb::Snapshot { data: None, metadata: Some(metadata) }
    });
    Some(raftpb::Message {
        r#type: Some(number),
        to: set(to),
        from: set(from),
        term: set(term),
        log_term: set(log_term),
        index: set(index),
        entries: entries.iter().map(entry_to_pb).collect(),
        commit: set(commit),
        snapshot,
        reject: message.reject.then_some(true),
        reject_hint: set(message.reject_hint),
        context: (!message.context.is_empty()).then_some(message.context),
        ..Default::default()
    })
}

/// No cluster comes this far. The crate adds to terms and indexes without looking.
const TERM_MAX: u64 = u64::MAX / 2;
const INDEX_MAX: u64 = u64::MAX / 2;

/// A message of another member, checked as far as the crate would panic on it or believe what cannot be.
pub fn message_from_pb(message: raftpb::Message, own_id: u64) -> Result<rs::Message, &'static str> {
    let msg_type = message_type_from_pb(message.r#type.unwrap_or(0)).ok_or("a kind no member sends")?;
    let from = message.from.unwrap_or(0);
    let index = message.index.unwrap_or(0);
    if message.to.unwrap_or(0) != own_id {
        return Err("for another member");
    }
    if from == 0 {
        return Err("from nobody");
    }
    if message.term.unwrap_or(0) > TERM_MAX {
        return Err("a term that nobody reaches");
    }
    let entries =
        message.entries.iter().map(entry_from_pb).collect::<Option<Vec<_>>>().ok_or("an unknown entry type")?;
    match msg_type {
        MessageType::MsgPropose if entries.is_empty() => return Err("a proposal of nothing"),
        MessageType::MsgReadIndex if entries.len() != 1 => return Err("a read request without its context"),
        MessageType::MsgPropose | MessageType::MsgReadIndex if message.term.unwrap_or(0) != 0 => {
            return Err("a request with a term");
        }
        // Local kinds carry no term; a kind between members without one would pass for local.
        MessageType::MsgPropose | MessageType::MsgReadIndex => {}
        _ if message.term.unwrap_or(0) == 0 => return Err("no term"),
        // Requests come back when leadership changes while they are on their way; what promises something does not.
        _ if from == own_id => return Err("from this member itself"),
        MessageType::MsgAppend => check_append(&message, &entries)?,
        MessageType::MsgSnapshot => check_snapshot(&message)?,
        _ => {}
    }
    let mut reject_hint = message.reject_hint.unwrap_or(0);
    if msg_type == MessageType::MsgAppendResponse {
        // etcd 3.4 tells where its log ends, however far that is; more than this says nothing to a leader.
        reject_hint = reject_hint.min(index);
    }
    let snapshot = message.snapshot.and_then(|s| s.metadata).map(|meta| {
        let conf_state = conf_state_from_pb(&meta.conf_state.unwrap_or_default());
        let metadata = rs::SnapshotMetadata {
            conf_state: Some(conf_state).into(),
            index: meta.index.unwrap_or(0),
            term: meta.term.unwrap_or(0),
            ..Default::default()
        };
        rs::Snapshot { metadata: Some(metadata).into(), ..Default::default() }
    });
    Ok(rs::Message {
        msg_type,
        to: own_id,
        from,
        term: message.term.unwrap_or(0),
        log_term: message.log_term.unwrap_or(0),
        index,
        entries: entries.into(),
        commit: message.commit.unwrap_or(0),
        snapshot: snapshot.into(),
        reject: message.reject.unwrap_or(false),
        reject_hint,
        context: message.context.unwrap_or_default(),
        ..Default::default()
    })
}

/// To the crate an entry that it does not have is one of term 0: whoever names that term is believed, wherever the log ends.
fn check_append(message: &raftpb::Message, entries: &[rs::Entry]) -> Result<(), &'static str> {
    let (index, mut term) = (message.index.unwrap_or(0), message.log_term.unwrap_or(0));
    if index > 0 && term == 0 {
        return Err("entries behind one of no term");
    }
    let mut last = index;
    for entry in entries {
        if last >= INDEX_MAX || entry.index != last + 1 {
            return Err("entries with a gap");
        }
        if entry.term == 0 || entry.term < term || entry.term > message.term.unwrap_or(0) {
            return Err("entries of terms that no leader puts in a row");
        }
        (last, term) = (entry.index, entry.term);
    }
    Ok(())
}

fn check_snapshot(message: &raftpb::Message) -> Result<(), &'static str> {
    let meta = message.snapshot.as_ref().and_then(|s| s.metadata.as_ref()).ok_or("a snapshot of nothing")?;
    let (index, term) = (meta.index.unwrap_or(0), meta.term.unwrap_or(0));
    // Its term may be newer than the message's: the state is taken when it is sent, and leadership may have changed.
    if !(1..=INDEX_MAX).contains(&index) || !(1..=TERM_MAX).contains(&term) {
        return Err("a snapshot of a state that no leader has");
    }
    let members = meta.conf_state.clone().unwrap_or_default();
    let ids: BTreeSet<u64> = members.voters.iter().chain(&members.learners).copied().collect();
    let is_clear = ids.len() == members.voters.len() + members.learners.len() && !ids.contains(&0);
    // etcd changes one member at a time: nothing is ever on its way from one list to another.
    let is_joint = !members.voters_outgoing.is_empty() || !members.learners_next.is_empty();
    if members.voters.is_empty() || !is_clear || is_joint {
        return Err("a snapshot with members that no cluster has");
    }
    Ok(())
}

/// Kinds that travel between members. The crate's numbers are etcd's.
const KINDS: [MessageType; 13] = [
    MessageType::MsgPropose,
    MessageType::MsgAppend,
    MessageType::MsgAppendResponse,
    MessageType::MsgRequestVote,
    MessageType::MsgRequestVoteResponse,
    MessageType::MsgSnapshot,
    MessageType::MsgHeartbeat,
    MessageType::MsgHeartbeatResponse,
    MessageType::MsgTimeoutNow,
    MessageType::MsgReadIndex,
    MessageType::MsgReadIndexResp,
    MessageType::MsgRequestPreVote,
    MessageType::MsgRequestPreVoteResponse,
];

fn message_type_to_pb(kind: MessageType) -> Option<i32> {
    KINDS.contains(&kind).then_some(kind as i32)
}

fn message_type_from_pb(number: i32) -> Option<MessageType> {
    KINDS.into_iter().find(|kind| *kind as i32 == number)
}

/// Whether apply will be able to read a proposal: an entry that nobody can read must not get into the log.
pub fn is_readable(entry: &rs::Entry) -> bool {
    match entry.entry_type {
        rs::EntryType::EntryNormal => crate::apply::is_readable(&entry.data),
        _ => raftpb::ConfChange::decode(entry.data.clone())
            .is_ok_and(|change| crate::cluster::Change::decode(&change).is_ok()),
    }
}

/// The id of the request in an entry: how the member that proposed it finds who waits. 0: none.
pub fn request_id(entry: &rs::Entry) -> u64 {
    if entry.entry_type != rs::EntryType::EntryNormal {
        return raftpb::ConfChange::decode(entry.data.clone()).ok().and_then(|change| change.id).unwrap_or(0);
    }
    let mut data = entry.data.clone();
    // Only these two fields are looked at; the request itself, which may be large, is passed over.
    while let Ok((tag, wire)) = prost::encoding::decode_key(&mut data) {
        let found = match tag {
            HEADER => header_id(&mut data),
            OWN_ID => prost::encoding::decode_varint(&mut data).ok(),
            _ => match prost::encoding::skip_field(wire, tag, &mut data, Default::default()) {
                Ok(()) => continue,
                Err(_) => return 0,
            },
        };
        match found {
            Some(id) if id != 0 => return id,
            Some(_) => {}
            None => return 0,
        }
    }
    0
}

/// Fields of `InternalRaftRequest`.
const HEADER: u32 = 100;
const OWN_ID: u32 = 1;

fn header_id(data: &mut Bytes) -> Option<u64> {
    RequestHeader::decode_length_delimited(data).ok().map(|header| header.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcdserverpb::{InternalRaftRequest, PutRequest};

    fn entry(data: Vec<u8>) -> rs::Entry {
        rs::Entry { data: data.into(), ..Default::default() }
    }

    #[test]
    fn request_id_is_found_behind_and_before_the_request() {
        let put = Some(PutRequest { key: "k".into(), value: vec![b'v'; 1000].into(), ..Default::default() });
        let header = Some(RequestHeader { id: 77, ..Default::default() });
        let request = InternalRaftRequest { header, put: put.clone(), ..Default::default() };
        assert_eq!(request_id(&entry(request.encode_to_vec())), 77);
        let request = InternalRaftRequest { id: 78, put, ..Default::default() };
        assert_eq!(request_id(&entry(request.encode_to_vec())), 78);
        assert_eq!(request_id(&entry(Vec::new())), 0);
        for cut in [b"\xa2".as_slice(), b"\xa2\x06\x05\x08", b"\x22\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff"] {
            assert_eq!(request_id(&entry(cut.to_vec())), 0, "{cut:?}");
        }
        let change = raftpb::ConfChange { id: Some(79), node_id: Some(1), ..Default::default() };
        let mut entry = entry(change.encode_to_vec());
        entry.entry_type = rs::EntryType::EntryConfChange;
        assert_eq!(request_id(&entry), 79);
    }

    #[test]
    fn what_would_panic_the_crate_is_refused() {
        let message = |kind: i32| raftpb::Message {
            r#type: Some(kind),
            to: Some(1),
            from: Some(2),
            term: Some(3),
            ..Default::default()
        };
        let refused = |m: raftpb::Message| message_from_pb(m, 1).err();
        assert_eq!(refused(message(8)), None);
        for local in [0, 1, 10, 11, 12, 13, 19, 23, -1, 1000] {
            assert_eq!(refused(message(local)), Some("a kind no member sends"), "{local}");
        }
        assert_eq!(refused(raftpb::Message { to: Some(2), ..message(8) }), Some("for another member"));
        assert_eq!(refused(raftpb::Message { from: None, ..message(8) }), Some("from nobody"));
        assert_eq!(refused(raftpb::Message { term: None, ..message(8) }), Some("no term"));
        assert_eq!(refused(message(2)), Some("a proposal of nothing"));
        let entry = |index, term| raftpb::Entry { index: Some(index), term: Some(term), ..Default::default() };
        let one = vec![entry(6, 2)];
        assert_eq!(refused(raftpb::Message { entries: one.clone(), ..message(2) }), Some("a request with a term"));
        assert_eq!(refused(message(15)), Some("a read request without its context"));
        let append = raftpb::Message { log_term: Some(2), index: Some(5), ..message(3) };
        assert_eq!(refused(raftpb::Message { entries: one.clone(), ..append.clone() }), None);
        for index in [4, 6, u64::MAX] {
            let m = raftpb::Message { entries: one.clone(), index: Some(index), ..append.clone() };
            assert_eq!(refused(m), Some("entries with a gap"), "{index}");
        }
        // The crate knows the term of what it does not have as 0, and takes it for the same.
        assert_eq!(
            refused(raftpb::Message { log_term: None, ..append.clone() }),
            Some("entries behind one of no term")
        );
        assert_eq!(refused(raftpb::Message { log_term: None, index: None, ..append.clone() }), None, "the first ones");
        for terms in [&[0][..], &[1], &[4], &[3, 2], &[2, 0]] {
            let entries = (6..).zip(terms).map(|(index, term)| entry(index, *term)).collect();
            let m = raftpb::Message { entries, ..append.clone() };
            assert_eq!(refused(m), Some("entries of terms that no leader puts in a row"), "{terms:?}");
        }
        let entries = vec![entry(6, 2), entry(7, 2), entry(8, 3)];
        assert_eq!(refused(raftpb::Message { entries, ..append.clone() }), None);
        assert_eq!(refused(raftpb::Message { from: Some(1), ..append }), Some("from this member itself"));
        // One more is added to it.
        for term in [u64::MAX, TERM_MAX + 1] {
            assert_eq!(
                refused(raftpb::Message { term: Some(term), ..message(17) }),
                Some("a term that nobody reaches")
            );
        }
        // As etcd 3.4 tells where its log ends; the crate adds one to it.
        let reject = raftpb::Message { reject: Some(true), reject_hint: Some(u64::MAX), index: Some(5), ..message(4) };
        assert_eq!(message_from_pb(reject, 1).unwrap().reject_hint, 5);
        assert_eq!(refused(message(7)), Some("a snapshot of nothing"));
        let snapshot = |index, term, voters: &[u64], learners: &[u64]| {
            let conf_state =
                raftpb::ConfState { voters: voters.into(), learners: learners.into(), ..Default::default() };
            let metadata = raftpb::SnapshotMetadata { conf_state: Some(conf_state), index, term };
            let snapshot = Some(raftpb::Snapshot { metadata: Some(metadata), ..Default::default() });
            raftpb::Message { snapshot, ..message(7) }
        };
        assert_eq!(refused(snapshot(Some(9), Some(4), &[2, 3], &[1])), None);
        for (index, term) in [(None, Some(3)), (Some(9), None), (Some(9), Some(u64::MAX)), (Some(u64::MAX), Some(3))] {
            let text = Some("a snapshot of a state that no leader has");
            assert_eq!(refused(snapshot(index, term, &[1], &[])), text, "{index:?} {term:?}");
        }
        for (voters, learners) in [(&[][..], &[1][..]), (&[1, 2], &[2]), (&[1, 1], &[]), (&[1, 0], &[])] {
            let text = Some("a snapshot with members that no cluster has");
            assert_eq!(refused(snapshot(Some(9), Some(3), voters, learners)), text, "{voters:?} {learners:?}");
        }
        let mut joint = snapshot(Some(9), Some(3), &[1], &[]);
        let metadata = joint.snapshot.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.conf_state.as_mut().unwrap().voters_outgoing = vec![2];
        assert_eq!(refused(joint), Some("a snapshot with members that no cluster has"));
        let strange = vec![raftpb::Entry { index: Some(1), r#type: Some(7), ..Default::default() }];
        assert_eq!(refused(raftpb::Message { entries: strange, ..message(3) }), Some("an unknown entry type"));
    }
}
