//! What must hold of all members together: one log, one meaning, one order in real time.
//!
//! The log itself is the witness of the order in which things took effect, so no search for an order is needed: each
//! answer must be the one that the model gives at the request's place in the log, and places must agree with real time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use actd::{
    apply::{Error, Response},
    cluster::{Members, Refusal},
    mvcc::hash::HashKv,
    pb::{
        etcdserverpb::{InternalRaftRequest, RangeRequest, RangeResponse},
        raftpb::{ConfChange, ConfChangeType, Entry},
    },
};
use bytes::Bytes;
use prost::Message;

use super::model::Model;

/// Members by id, and whether they only learn.
#[derive(Clone, Debug, Default, PartialEq)]
struct Membership {
    learners: BTreeMap<u64, bool>,
    removed: BTreeSet<u64>,
}

impl Membership {
    /// The largest number of learners.
    const LEARNERS: usize = 2;

    fn of(members: &Members) -> Self {
        Self {
            learners: members.iter().map(|member| (member.id, member.is_learner)).collect(),
            removed: members.removed().collect(),
        }
    }

    fn change(&mut self, change: &ConfChange) -> Result<(), Refusal> {
        let id = change.node_id();
        let known = self.learners.get(&id).copied();
        let learners = self.learners.values().filter(|is_learner| **is_learner).count();
        let is_promote = str::from_utf8(change.context()).is_ok_and(|context| context.contains("\"isPromote\":true"));
        if self.removed.contains(&id) {
            return Err(Refusal::Removed);
        }
        match (change.r#type(), known) {
            (ConfChangeType::ConfChangeAddNode, Some(true)) if is_promote => drop(self.learners.insert(id, false)),
            (ConfChangeType::ConfChangeAddNode, Some(false)) if is_promote => return Err(Refusal::NotLearner),
            (ConfChangeType::ConfChangeAddNode, None) if is_promote => return Err(Refusal::NotFound),
            (ConfChangeType::ConfChangeAddNode | ConfChangeType::ConfChangeAddLearnerNode, Some(_)) => {
                return Err(Refusal::Exists);
            }
            (ConfChangeType::ConfChangeAddNode, None) => drop(self.learners.insert(id, false)),
            (ConfChangeType::ConfChangeAddLearnerNode, None) if learners >= Self::LEARNERS => {
                return Err(Refusal::TooManyLearners);
            }
            (ConfChangeType::ConfChangeAddLearnerNode, None) => drop(self.learners.insert(id, true)),
            (ConfChangeType::ConfChangeRemoveNode, Some(_)) => {
                self.learners.remove(&id);
                self.removed.insert(id);
            }
            (ConfChangeType::ConfChangeRemoveNode, None) => return Err(Refusal::NotFound),
            (kind, _) => panic!("nobody asks for {kind:?}"),
        }
        Ok(())
    }
}

/// A point in the log: operations that have ended stand at or before it.
pub type Place = u64;

pub struct Truth {
    /// Term and content of each entry that some member has applied.
    entries: BTreeMap<u64, (u64, Bytes)>,
    /// Everything up to here is executed.
    pub executed: u64,
    pub model: Model,
    /// Outcome and index of each request, by its id.
    outcomes: HashMap<u64, (u64, Result<Response, Error>)>,
    /// The same of each membership change; if it was done, the members stand at its index.
    changes: HashMap<u64, (u64, Result<(), Refusal>)>,
    /// The entry that made each revision, and the revision after each entry.
    made_at: BTreeMap<i64, u64>,
    revision_after: BTreeMap<u64, i64>,
    compacted_after: BTreeMap<u64, i64>,
    /// Each revocation: the lease, the request and its term.
    pub revoked: Vec<(i64, u64, u64)>,
    /// The members after each change of them.
    members: BTreeMap<u64, Membership>,
    /// The first hash of the state at an index, and whose it was.
    hashes: BTreeMap<u64, (u64, u64)>,
    /// The hash of each compaction after another, and whose it was.
    compactions: BTreeMap<(i64, i64), (u32, u64)>,
    /// The leader of each term.
    leaders: BTreeMap<u64, u64>,
    /// What has ended stands at or before this place.
    ended: Place,
    pub checked: u64,
}

impl Truth {
    /// Whether that member was removed, as far as anybody knows.
    pub fn is_removed(&self, id: u64) -> bool {
        self.members.last_key_value().is_some_and(|(_, members)| members.removed.contains(&id))
    }

    pub fn new(min_ttl: i64) -> Self {
        Self {
            entries: BTreeMap::new(),
            executed: 0,
            model: Model::new(min_ttl),
            outcomes: HashMap::new(),
            changes: HashMap::new(),
            made_at: BTreeMap::from([(1, 0)]),
            revision_after: BTreeMap::from([(0, 1)]),
            compacted_after: BTreeMap::from([(0, -1)]),
            revoked: Vec::new(),
            members: BTreeMap::from([(0, Membership::default())]),
            hashes: BTreeMap::new(),
            compactions: BTreeMap::new(),
            leaders: BTreeMap::new(),
            ended: 0,
            checked: 0,
        }
    }

    /// Some member applies an entry. Members apply without gaps, so the first to come here executes the model.
    pub fn applied(&mut self, member: u64, index: u64, term: u64, data: &Bytes, conf_change: bool) {
        if let Some((other_term, other)) = self.entries.get(&index) {
            assert!(
                *other_term == term && other == data,
                "entry {index} of member {member:x} (term {term}) is not what was applied elsewhere (term {other_term})"
            );
            return;
        }
        assert_eq!(index, self.executed + 1, "entry {index} is applied before the one below it anywhere");
        self.entries.insert(index, (term, data.clone()));
        self.executed = index;
        if !conf_change && !data.is_empty() {
            let request = InternalRaftRequest::decode(data.clone()).expect("entries decode");
            let before = self.model.revision;
            let outcome = self.model.execute(&request);
            if self.model.revision > before {
                self.made_at.insert(self.model.revision, index);
            }
            if let (Some(revoke), Ok(_)) = (&request.lease_revoke, &outcome) {
                self.revoked.push((revoke.id, request.header.as_ref().map_or(0, |h| h.id), term));
            }
            let id = request.header.as_ref().map_or(0, |h| h.id);
            assert!(self.outcomes.insert(id, (index, outcome)).is_none(), "request {id:x} is in the log twice");
        }
        if conf_change {
            let change = ConfChange::decode(data.clone()).expect("membership changes decode");
            let mut members = self.members.last_key_value().expect("there is a first").1.clone();
            let outcome = members.change(&change);
            self.members.insert(index, members);
            // The first entries of a cluster have no id.
            let id = change.id();
            let is_new = id == 0 || self.changes.insert(id, (index, outcome)).is_none();
            assert!(is_new, "membership change {id:x} is in the log twice");
        }
        self.revision_after.insert(index, self.model.revision);
        self.compacted_after.insert(index, self.model.compacted);
    }

    /// A member's state at an index.
    pub fn state(&mut self, member: u64, index: u64, hash: u64) {
        let (first, other) = *self.hashes.entry(index).or_insert((hash, member));
        assert_eq!(first, hash, "members {member:x} and {other:x} differ in state at index {index}");
        self.checked += 1;
    }

    /// What a member knows of the members at an index.
    pub fn members(&mut self, member: u64, index: u64, told: &Members) {
        let expected = self.members.range(..=index).next_back().expect("there is a first").1;
        let told = Membership::of(told);
        assert_eq!(*expected, told, "member {member:x} knows other members at index {index}");
        self.checked += 1;
    }

    /// A member starts where it was (H-9).
    pub fn starts(&self, member: u64, applied: u64, revision: i64) {
        let expected = *self.revision_after.range(..=applied).next_back().expect("there is a first").1;
        assert_eq!(revision, expected, "member {member:x} starts at revision {revision} with index {applied} applied");
    }

    /// A log as a member found it at its start: what it has of what was applied is what was applied.
    pub fn recovered(&mut self, member: u64, entries: &[Entry]) {
        for entry in entries {
            if let Some((term, data)) = self.entries.get(&entry.index())
                && *term == entry.term()
            {
                let found = entry.data.clone().unwrap_or_default();
                assert_eq!(*data, found, "the log of member {member:x} has another entry {}", entry.index());
            }
        }
    }

    /// What a member says that a compaction left.
    pub fn compaction(&mut self, member: u64, hash: &HashKv) {
        let key = (hash.hash_revision, hash.compact_revision);
        let (first, other) = *self.compactions.entry(key).or_insert((hash.hash, member));
        assert_eq!(first, hash.hash, "members {member:x} and {other:x} differ in what compaction {key:?} left");
        self.checked += 1;
    }

    pub fn leads(&mut self, member: u64, term: u64) {
        let leader = *self.leaders.entry(term).or_insert(member);
        assert_eq!(leader, member, "two leaders of term {term}");
    }

    /// What an operation that begins now must not stand before.
    pub fn begin(&self) -> Place {
        self.ended
    }

    /// The term in which a request that was answered came into the log.
    pub fn term_of(&self, request: u64) -> u64 {
        self.outcomes.get(&request).and_then(|(index, _)| self.entries.get(index)).map_or(0, |(term, _)| *term)
    }

    /// A write was answered.
    pub fn written(&mut self, id: u64, floor: Place, answer: &Result<Response, Error>) {
        let Some((index, expected)) = self.outcomes.get(&id) else {
            panic!("request {id:x} was answered with {answer:?}, but is in no log");
        };
        assert_eq!(answer, expected, "request {id:x} at index {index}");
        assert!(*index > floor, "request {id:x} at index {index} began after index {floor} had been answered");
        self.ended = self.ended.max(*index);
        self.checked += 1;
    }

    /// A membership change was answered.
    pub fn changed(&mut self, id: u64, floor: Place, answer: Result<&Members, Refusal>) {
        let Some((index, outcome)) = self.changes.get(&id) else {
            panic!("membership change {id:x} was answered with {answer:?}, but is in no log");
        };
        let expected = outcome.map(|()| &self.members[index]);
        let answer = answer.map(Membership::of);
        assert_eq!(answer.as_ref().map_err(|e| *e), expected, "membership change {id:x} at index {index}");
        assert!(
            *index > floor,
            "membership change {id:x} at index {index} began after index {floor} had been answered"
        );
        self.ended = self.ended.max(*index);
        self.checked += 1;
    }

    /// A request that was refused as a whole.
    pub fn refused(&self, id: u64) {
        let is_there = self.outcomes.contains_key(&id) || self.changes.contains_key(&id);
        assert!(!is_there, "request {id:x} was refused and yet is in the log");
    }

    /// A range was answered. A linearizable one must know of everything that had ended when it began.
    pub fn read(&mut self, req: &RangeRequest, floor: Place, answer: &RangeResponse) {
        let newest = answer.header.as_ref().map_or(0, |h| h.revision);
        let Some(&made_at) = self.made_at.get(&newest) else {
            panic!("a range was answered at revision {newest}, which no entry made");
        };
        // The reader's compact revision is not told; one that answers has not compacted what it reads.
        let expected = self.model.range(req, newest, -1).expect("the reader knows its own revision");
        assert_eq!(*answer, expected, "{req:?}");
        if !req.serializable {
            let compacted = *self.compacted_after.range(..=floor).next_back().expect("there is a first").1;
            let is_gone = req.revision > 0 && req.revision < compacted;
            assert!(!is_gone, "a read began after revision {compacted} was compacted: {req:?}");
            let least = *self.revision_after.range(..=floor).next_back().expect("there is a first").1;
            assert!(newest >= least, "a read began after revision {least} was known, and is at {newest}: {req:?}");
            self.ended = self.ended.max(made_at);
        }
        self.checked += 1;
    }

    /// A range was refused.
    pub fn read_refused(&self, req: &RangeRequest, floor: Place, error: &Error) {
        match error {
            Error::Compacted => {
                assert!(req.revision > 0 && req.revision < self.model.compacted, "nobody compacted {}", req.revision);
            }
            Error::FutureRev => {
                let known = *self.revision_after.range(..=floor).next_back().expect("there is a first").1;
                let least = if req.serializable { 1 } else { known };
                assert!(req.revision > least, "revision {} is no future one, {least} was known", req.revision);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actd::cluster::Change;
    use actd::pb::etcdserverpb::{CompactionRequest, PutRequest, RequestHeader};

    fn put(id: u64, value: &str) -> Bytes {
        let put = PutRequest { key: "k".into(), value: value.to_owned().into(), ..Default::default() };
        let header = Some(RequestHeader { id, ..Default::default() });
        InternalRaftRequest { header, put: Some(put), ..Default::default() }.encode_to_vec().into()
    }

    fn two_puts() -> Truth {
        let mut truth = Truth::new(2);
        truth.applied(1, 1, 1, &put(11, "a"), false);
        truth.applied(1, 2, 1, &put(12, "b"), false);
        truth
    }

    fn get(truth: &Truth, newest: i64) -> (RangeRequest, RangeResponse) {
        let req = RangeRequest { key: "k".into(), ..Default::default() };
        let answer = truth.model.range(&req, newest, -1).unwrap();
        (req, answer)
    }

    fn answer_of(truth: &Truth, id: u64) -> Result<Response, Error> {
        truth.outcomes[&id].1.clone()
    }

    fn fails(check: impl FnOnce() + std::panic::UnwindSafe) -> String {
        let panic = std::panic::catch_unwind(check).expect_err("the history is bad");
        panic.downcast_ref::<String>().cloned().unwrap_or_default()
    }

    #[test]
    fn good_histories_pass() {
        let mut truth = two_puts();
        truth.applied(2, 1, 1, &put(11, "a"), false);
        let begin = truth.begin();
        // Side by side: answered in the other order.
        let answer = answer_of(&truth, 12);
        truth.written(12, begin, &answer);
        let answer = answer_of(&truth, 11);
        truth.written(11, begin, &answer);
        // A read beside them may see less, one after them may not.
        let (req, old) = get(&truth, 2);
        truth.read(&req, begin, &old);
        let (req, new) = get(&truth, 3);
        truth.read(&req, truth.begin(), &new);
        let serializable = RangeRequest { serializable: true, ..req };
        truth.read(&serializable, truth.begin(), &old);
        truth.refused(99);
    }

    #[test]
    fn stale_reads_are_found() {
        let mut truth = two_puts();
        let answer = answer_of(&truth, 12);
        truth.written(12, 0, &answer);
        let (req, old) = get(&truth, 2);
        let floor = truth.begin();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.read(&req, floor, &old)));
        assert!(text.contains("a read began after revision 3"), "{text}");
    }

    #[test]
    fn reads_that_go_back_are_found() {
        let mut truth = two_puts();
        let (req, new) = get(&truth, 3);
        truth.read(&req, 0, &new);
        let (req, old) = get(&truth, 2);
        let floor = truth.begin();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.read(&req, floor, &old)));
        assert!(text.contains("is at 2"), "{text}");
    }

    #[test]
    fn stale_refusals_and_reads_of_what_is_compacted_are_found() {
        let mut truth = two_puts();
        let compaction = Some(CompactionRequest { revision: 3, physical: false });
        let header = Some(RequestHeader { id: 13, ..Default::default() });
        let request = InternalRaftRequest { header, compaction, ..Default::default() };
        truth.applied(1, 3, 1, &request.encode_to_vec().into(), false);
        let answer = answer_of(&truth, 13);
        truth.written(13, 0, &answer);
        let floor = truth.begin();
        let at = |revision| RangeRequest { key: "k".into(), revision, ..Default::default() };
        truth.read_refused(&at(4), floor, &Error::FutureRev);
        truth.read_refused(&at(2), floor, &Error::Compacted);
        fails(std::panic::AssertUnwindSafe(|| truth.read_refused(&at(3), floor, &Error::FutureRev)));
        fails(std::panic::AssertUnwindSafe(|| truth.read_refused(&at(3), floor, &Error::Compacted)));
        let old = truth.model.range(&at(2), 3, -1).unwrap();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.read(&at(2), floor, &old)));
        assert!(text.contains("after revision 3 was compacted"), "{text}");
    }

    #[test]
    fn members_are_what_the_log_says() {
        let change = |kind: ConfChangeType, id| {
            let change = ConfChange { r#type: Some(kind.into()), node_id: Some(id), ..Default::default() };
            Bytes::from(change.encode_to_vec())
        };
        let promote = |id| Bytes::from(Change::Promote(id).encode(90 + id).encode_to_vec());
        let mut truth = Truth::new(2);
        truth.applied(1, 1, 1, &change(ConfChangeType::ConfChangeAddNode, 7), true);
        truth.applied(1, 2, 1, &change(ConfChangeType::ConfChangeAddLearnerNode, 8), true);
        truth.applied(1, 3, 1, &change(ConfChangeType::ConfChangeRemoveNode, 7), true);
        truth.applied(1, 4, 1, &change(ConfChangeType::ConfChangeAddNode, 7), true);
        truth.applied(1, 5, 1, &promote(8), true);
        let members = &truth.members[&5];
        assert_eq!(members.learners, BTreeMap::from([(8, false)]));
        assert_eq!(members.removed, BTreeSet::from([7]));
        assert_eq!(truth.members[&2].learners, BTreeMap::from([(7, false), (8, true)]));
        fails(std::panic::AssertUnwindSafe(|| truth.members(1, 5, &Members::default())));
        truth.applied(1, 6, 1, &promote(7), true);
        truth.changed(97, 5, Err(Refusal::Removed));
        fails(std::panic::AssertUnwindSafe(|| truth.changed(97, 5, Err(Refusal::NotFound))));
        fails(std::panic::AssertUnwindSafe(|| truth.changed(97, 6, Err(Refusal::Removed))));
        fails(std::panic::AssertUnwindSafe(|| truth.changed(98, 5, Ok(&Members::default()))));
        let text = fails(std::panic::AssertUnwindSafe(|| truth.changed(99, 5, Err(Refusal::Removed))));
        assert!(text.contains("is in no log"), "{text}");
        let text = fails(std::panic::AssertUnwindSafe(|| truth.refused(98)));
        assert!(text.contains("was refused and yet"), "{text}");
        let text = fails(std::panic::AssertUnwindSafe(|| truth.applied(1, 7, 1, &promote(7), true)));
        assert!(text.contains("in the log twice"), "{text}");
    }

    #[test]
    fn lost_doubled_and_divergent_writes_are_found() {
        let mut truth = two_puts();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.written(13, 0, &Ok(Response::Done))));
        assert!(text.contains("is in no log"), "{text}");
        let text = fails(std::panic::AssertUnwindSafe(|| truth.applied(1, 3, 1, &put(12, "b"), false)));
        assert!(text.contains("in the log twice"), "{text}");
        let mut truth = two_puts();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.applied(2, 2, 2, &put(13, "c"), false)));
        assert!(text.contains("is not what was applied elsewhere"), "{text}");
        let text = fails(std::panic::AssertUnwindSafe(|| truth.refused(11)));
        assert!(text.contains("was refused and yet"), "{text}");
    }

    #[test]
    fn wrong_answers_and_late_places_are_found() {
        let mut truth = two_puts();
        let other = answer_of(&truth, 11);
        fails(std::panic::AssertUnwindSafe(|| truth.written(12, 0, &other)));
        let answer = answer_of(&truth, 12);
        truth.written(12, 0, &answer);
        // It began after index 2 was answered, yet stands before it.
        let floor = truth.begin();
        let text = fails(std::panic::AssertUnwindSafe(|| truth.written(11, floor, &other)));
        assert!(text.contains("began after index 2"), "{text}");
    }

    #[test]
    fn two_leaders_of_one_term_and_two_states_are_found() {
        let mut truth = two_puts();
        truth.leads(1, 5);
        truth.leads(1, 5);
        fails(std::panic::AssertUnwindSafe(|| truth.leads(2, 5)));
        truth.state(1, 2, 77);
        fails(std::panic::AssertUnwindSafe(|| truth.state(2, 2, 78)));
    }
}
