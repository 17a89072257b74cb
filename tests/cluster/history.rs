//! What clients did and what the cluster's history says: do they fit?
//!
//! Every answer of the server carries a revision, so the history itself names the order in which things took effect, and
//! checking it is simpler and stricter than a search for some order: each operation has a place in the sequence of
//! revisions, its answer must be right at that place, and an operation that began after another had ended must not stand
//! before it. No clocks, no sockets: times are numbers.

use std::collections::{BTreeMap, HashMap};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Put {
        key: String,
        value: String,
    },
    Delete {
        key: String,
    },
    Get {
        key: String,
    },
    /// Puts if the key's newest change has this revision (0: there is no key).
    PutIf {
        key: String,
        mod_revision: i64,
        value: String,
    },
    /// Several puts in one transaction, each of another key.
    PutAll {
        pairs: Vec<(String, String)>,
    },
    /// A get that may answer with an older state.
    GetSerializable {
        key: String,
    },
}

impl Call {
    /// What it puts, where it takes effect.
    fn puts(&self) -> Vec<(&str, &str)> {
        match self {
            Call::Put { key, value } | Call::PutIf { key, value, .. } => vec![(key, value)],
            Call::PutAll { pairs } => pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
            Call::Delete { .. } | Call::Get { .. } | Call::GetSerializable { .. } => vec![],
        }
    }
}

/// A key's value and the revision of its newest change.
pub type Found = Option<(String, i64)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The header's revision, and what the call tells beside it.
    Done { revision: i64, found: Found, applied: bool },
    /// Certainly nothing happened.
    Refused,
    /// It may take effect at any later time, once, or never.
    Unknown,
}

#[derive(Clone, Debug)]
pub struct Op {
    #[allow(dead_code)] // printed
    pub client: usize,
    pub call: Call,
    pub start: u64,
    pub end: u64,
    pub outcome: Outcome,
}

/// One change as a watcher saw it; `None`: a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub revision: i64,
    pub key: String,
    pub value: Option<String>,
}

/// Where an operation stands: at this revision, as its writer or as somebody who saw it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    revision: i64,
    reads: bool,
}

/// Checks that `events`, the whole history from revision 2 on, explains all of `ops`.
pub fn check(ops: &[Op], events: &[Event]) -> Result<(), String> {
    let history = History::new(events)?;
    let mut places: Vec<(Place, &Op)> = Vec::new();
    for op in ops {
        if let Some(place) = history.place(op)? {
            places.push((place, op));
        }
    }
    history.check_writers(ops)?;
    history.check_deletions(ops)?;
    check_real_time(&places)
}

struct History<'a> {
    /// Each key's changes by revision.
    keys: HashMap<&'a str, BTreeMap<i64, Option<&'a str>>>,
    /// Where each value was put; values are unique.
    values: HashMap<&'a str, &'a Event>,
    events: &'a [Event],
    newest: i64,
}

impl<'a> History<'a> {
    fn new(events: &'a [Event]) -> Result<Self, String> {
        let mut keys: HashMap<&str, BTreeMap<i64, Option<&str>>> = HashMap::new();
        let mut values = HashMap::new();
        let mut newest = 1;
        for event in events {
            if event.revision < newest {
                return Err(format!("the history goes back at {event:?}"));
            }
            newest = event.revision;
            if let Some(value) = &event.value
                && let Some(before) = values.insert(value.as_str(), event)
            {
                return Err(format!("{value} took effect twice: {before:?} and {event:?}"));
            }
            keys.entry(&event.key).or_default().insert(event.revision, event.value.as_deref());
        }
        Ok(Self { keys, values, events, newest })
    }

    fn at(&self, key: &str, revision: i64) -> Found {
        let (at, value) = self.keys.get(key)?.range(..=revision).next_back()?;
        value.map(|value| (value.to_owned(), *at))
    }

    fn event(&self, key: &str, revision: i64) -> Option<Option<&'a str>> {
        self.keys.get(key)?.get(&revision).copied()
    }

    /// Whether every value that is there was written by somebody who may have written it.
    fn check_writers(&self, ops: &[Op]) -> Result<(), String> {
        let puts = ops.iter().flat_map(|op| op.call.puts().into_iter().map(move |put| (put.1, (put.0, op))));
        let writers: HashMap<&str, (&str, &Op)> = puts.collect();
        for event in self.events {
            let Some(value) = &event.value else { continue };
            let Some((key, op)) = writers.get(value.as_str()) else { return Err(format!("nobody wrote {event:?}")) };
            if *key != event.key {
                return Err(format!("{op:?} is at another key: {event:?}"));
            }
            match &op.outcome {
                Outcome::Refused => return Err(format!("{op:?} was refused and yet is there: {event:?}")),
                Outcome::Done { applied: false, .. } => {
                    return Err(format!("{op:?} did not apply and yet is there: {event:?}"));
                }
                Outcome::Done { revision, .. } if *revision != event.revision => {
                    return Err(format!("{op:?} is at another revision: {event:?}"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether every deletion was asked for by somebody, each by another one.
    fn check_deletions(&self, ops: &[Op]) -> Result<(), String> {
        let mut known: HashMap<(&str, i64), usize> = HashMap::new();
        let mut open: HashMap<&str, usize> = HashMap::new();
        for op in ops {
            let Call::Delete { key } = &op.call else { continue };
            match &op.outcome {
                Outcome::Done { revision, applied: true, .. } => *known.entry((key, *revision)).or_default() += 1,
                Outcome::Unknown => *open.entry(key).or_default() += 1,
                _ => {}
            }
        }
        for event in self.events.iter().filter(|event| event.value.is_none()) {
            let key = event.key.as_str();
            let asked = match known.get_mut(&(key, event.revision)) {
                Some(count) => count,
                None => open.entry(key).or_default(),
            };
            if *asked == 0 {
                return Err(format!("nobody asked for the deletion {event:?}"));
            }
            *asked -= 1;
        }
        Ok(())
    }

    /// Checks an answer against the history; its place, if it has one that real time speaks of.
    fn place(&self, op: &Op) -> Result<Option<Place>, String> {
        let (revision, found, applied) = match &op.outcome {
            Outcome::Done { revision, found, applied } => (*revision, found, *applied),
            Outcome::Refused => return Ok(None),
            Outcome::Unknown => {
                // If it took effect, it did so after it was begun, and as a whole.
                let puts = op.call.puts();
                let at: Vec<_> = puts.iter().map(|(_, value)| self.values.get(value).map(|e| e.revision)).collect();
                if at.windows(2).any(|pair| pair[0] != pair[1]) {
                    return Err(format!("{op:?} took effect in part: at {at:?}"));
                }
                return Ok(at.first().copied().flatten().map(|revision| Place { revision, reads: false }));
            }
        };
        if revision > self.newest && !matches!(op.call, Call::Get { .. } | Call::GetSerializable { .. }) {
            return Err(format!("{op:?} is not in the history, which ends at {}", self.newest));
        }
        let writes = |key: &str, value: Option<&str>| match self.event(key, revision) {
            Some(found) if found == value => Ok(Some(Place { revision, reads: false })),
            other => Err(format!("{op:?}: the history has {other:?} there")),
        };
        match &op.call {
            Call::Put { key, value } => writes(key, Some(value)),
            Call::PutAll { pairs } => {
                for (key, value) in pairs {
                    writes(key, Some(value))?;
                }
                Ok(Some(Place { revision, reads: false }))
            }
            Call::Delete { key } if applied => writes(key, None),
            Call::PutIf { key, mod_revision, value } if applied => {
                let before = self.at(key, revision - 1).map_or(0, |(_, at)| at);
                if before != *mod_revision {
                    return Err(format!("{op:?} applied, but the key was at {before}"));
                }
                writes(key, Some(value))
            }
            Call::PutIf { key, mod_revision, .. } => {
                let now = self.at(key, revision).map_or(0, |(_, at)| at);
                if now == *mod_revision {
                    return Err(format!("{op:?} did not apply, but the key was at {now}"));
                }
                Ok(Some(Place { revision, reads: true }))
            }
            Call::Delete { key } => match self.at(key, revision) {
                None => Ok(Some(Place { revision, reads: true })),
                there => Err(format!("{op:?} found nothing, but there was {there:?}")),
            },
            Call::Get { key } | Call::GetSerializable { key } => {
                let there = self.at(key, revision);
                if there != *found {
                    return Err(format!("{op:?}: at that revision there was {there:?}"));
                }
                // An older state is allowed to who asked for it.
                Ok(matches!(op.call, Call::Get { .. }).then_some(Place { revision, reads: true }))
            }
        }
    }
}

/// What began after something had ended stands behind it.
fn check_real_time(places: &[(Place, &Op)]) -> Result<(), String> {
    let mut by_start: Vec<_> = places.iter().collect();
    by_start.sort_by_key(|(_, op)| op.start);
    let mut by_end: Vec<_> = places.iter().filter(|(_, op)| op.outcome != Outcome::Unknown).collect();
    by_end.sort_by_key(|(_, op)| op.end);
    let mut ended = by_end.into_iter().peekable();
    let mut furthest: Option<&(Place, &Op)> = None;
    for (place, op) in by_start {
        while let Some(done) = ended.next_if(|(_, done)| done.end < op.start) {
            if furthest.is_none_or(|far| far.0 < done.0) {
                furthest = Some(done);
            }
        }
        if let Some((far, before)) = furthest {
            // Who reads at a revision stands behind its writer.
            let behind = if place.reads { place.revision >= far.revision } else { place.revision > far.revision };
            if !behind {
                return Err(format!("{op:?} began after {before:?} had ended, but does not know of it"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(revision: i64, found: Found, applied: bool) -> Outcome {
        Outcome::Done { revision, found, applied }
    }

    fn put(value: &str, start: u64, end: u64, revision: i64) -> Op {
        let call = Call::Put { key: "k".into(), value: value.into() };
        Op { client: 0, call, start, end, outcome: done(revision, None, true) }
    }

    fn get(found: Option<(&str, i64)>, start: u64, end: u64, revision: i64) -> Op {
        let found = found.map(|(value, at)| (value.to_owned(), at));
        Op { client: 1, call: Call::Get { key: "k".into() }, start, end, outcome: done(revision, found, true) }
    }

    fn put_if(value: &str, mod_revision: i64, start: u64, end: u64, revision: i64, applied: bool) -> Op {
        let call = Call::PutIf { key: "k".into(), mod_revision, value: value.into() };
        Op { client: 2, call, start, end, outcome: done(revision, None, applied) }
    }

    /// Of the keys k, l, m ...
    fn put_all(values: &[&str], start: u64, end: u64, revision: i64) -> Op {
        let pairs = ('k'..).zip(values).map(|(key, value)| (key.to_string(), (*value).to_owned())).collect();
        Op { client: 4, call: Call::PutAll { pairs }, start, end, outcome: done(revision, None, true) }
    }

    fn event(revision: i64, key: &str, value: &str) -> Event {
        Event { revision, key: key.into(), value: Some(value.into()) }
    }

    fn unknown(mut op: Op) -> Op {
        op.outcome = Outcome::Unknown;
        op
    }

    fn refused(mut op: Op) -> Op {
        op.outcome = Outcome::Refused;
        op
    }

    fn old(mut op: Op) -> Op {
        op.call = Call::GetSerializable { key: "k".into() };
        op
    }

    fn delete(start: u64, end: u64, revision: i64, applied: bool) -> Op {
        let call = Call::Delete { key: "k".into() };
        Op { client: 3, call, start, end, outcome: done(revision, None, applied) }
    }

    fn events(values: &[Option<&str>]) -> Vec<Event> {
        let event = |(revision, value): (i64, &Option<&str>)| Event {
            revision,
            key: "k".into(),
            value: value.map(str::to_owned),
        };
        (2..).zip(values).map(event).collect()
    }

    #[test]
    fn good_histories_pass() {
        let ab = events(&[Some("a"), Some("b")]);
        let good: Vec<(&str, Vec<Op>, Vec<Event>)> = vec![
            ("nothing", vec![], vec![]),
            (
                "one after the other",
                vec![put("a", 0, 1, 2), put("b", 2, 3, 3), get(Some(("b", 3)), 4, 5, 3)],
                ab.clone(),
            ),
            ("side by side, either order", vec![put("b", 0, 9, 3), put("a", 0, 9, 2)], ab.clone()),
            (
                "a read beside a write sees the old",
                vec![put("a", 0, 1, 2), put("b", 2, 9, 3), get(Some(("a", 2)), 3, 4, 2)],
                ab.clone(),
            ),
            ("or the new", vec![put("a", 0, 1, 2), put("b", 2, 9, 3), get(Some(("b", 3)), 3, 4, 3)], ab.clone()),
            ("unknown and never", vec![unknown(put("x", 0, 1, 0))], vec![]),
            ("unknown and later", vec![unknown(put("b", 0, 1, 0)), put("a", 2, 3, 2)], ab.clone()),
            ("refused and not there", vec![refused(put("x", 0, 1, 0)), put("a", 2, 3, 2)], events(&[Some("a")])),
            (
                "an old state for who asked for it",
                vec![put("a", 0, 1, 2), put("b", 2, 3, 3), old(get(Some(("a", 2)), 4, 5, 2))],
                ab.clone(),
            ),
            ("compared and put", vec![put("a", 0, 1, 2), put_if("b", 2, 2, 3, 3, true)], ab.clone()),
            (
                "compared and left",
                vec![put("a", 0, 1, 2), put("b", 2, 3, 3), put_if("c", 2, 4, 5, 3, false)],
                ab.clone(),
            ),
            ("deleted", vec![put("a", 0, 1, 2), delete(2, 3, 3, true), get(None, 4, 5, 3)], events(&[Some("a"), None])),
            (
                "deleted by somebody who never heard of it",
                vec![put("a", 0, 1, 2), unknown(delete(0, 9, 0, true))],
                events(&[Some("a"), None]),
            ),
            ("nothing to delete", vec![delete(0, 1, 1, false)], vec![]),
            (
                "several at once",
                vec![put_all(&["a", "b"], 0, 1, 2), get(Some(("a", 2)), 2, 3, 2)],
                vec![event(2, "k", "a"), event(2, "l", "b")],
            ),
            (
                "several at once, unknown and later",
                vec![unknown(put_all(&["a", "b"], 0, 1, 0)), put("x", 2, 3, 2)],
                vec![event(2, "k", "x"), event(3, "k", "a"), event(3, "l", "b")],
            ),
            ("several at once, unknown and never", vec![unknown(put_all(&["a", "b"], 0, 1, 0))], vec![]),
        ];
        for (name, ops, events) in good {
            assert_eq!(check(&ops, &events), Ok(()), "{name}");
        }
    }

    #[test]
    fn bad_histories_are_found() {
        let ab = events(&[Some("a"), Some("b")]);
        let bad: Vec<(&str, Vec<Op>, Vec<Event>, &str)> = vec![
            ("lost write", vec![put("a", 0, 1, 2)], vec![], "not in the history"),
            ("overwritten by another", vec![put("x", 0, 1, 2), put("a", 0, 9, 2)], ab.clone(), "the history has"),
            (
                "stale read",
                vec![put("a", 0, 1, 2), put("b", 2, 3, 3), get(Some(("a", 2)), 4, 5, 2)],
                ab.clone(),
                "does not know of it",
            ),
            (
                "read of another value",
                vec![put("a", 0, 1, 2), get(Some(("x", 2)), 2, 3, 2)],
                events(&[Some("a")]),
                "there was",
            ),
            (
                "read of a key that is gone",
                vec![put("a", 0, 1, 2), get(None, 2, 3, 2)],
                events(&[Some("a")]),
                "there was",
            ),
            ("writes against time", vec![put("b", 0, 1, 3), put("a", 2, 3, 2)], ab.clone(), "does not know of it"),
            (
                "a read ahead of one that ended before",
                vec![
                    put("a", 0, 1, 2),
                    unknown(put("b", 0, 1, 0)),
                    get(Some(("b", 3)), 2, 3, 3),
                    get(Some(("a", 2)), 4, 5, 2),
                ],
                ab.clone(),
                "does not know of it",
            ),
            ("applied twice", vec![unknown(put("a", 0, 1, 0))], events(&[Some("a"), Some("a")]), "twice"),
            ("deleted by nobody", vec![put("a", 0, 1, 2)], events(&[Some("a"), None]), "nobody asked"),
            (
                "deleted although refused",
                vec![put("a", 0, 1, 2), refused(delete(2, 3, 0, true))],
                events(&[Some("a"), None]),
                "nobody asked",
            ),
            (
                "deleted twice by one",
                vec![put("a", 0, 1, 2), delete(2, 3, 3, true), put("b", 4, 5, 4)],
                events(&[Some("a"), None, Some("b"), None]),
                "nobody asked",
            ),
            ("never written", vec![], events(&[Some("a")]), "nobody wrote"),
            ("refused and there", vec![refused(put("a", 0, 1, 0))], events(&[Some("a")]), "was refused"),
            (
                "compared wrongly",
                vec![put("a", 0, 1, 2), put_if("b", 1, 2, 3, 3, true)],
                ab.clone(),
                "but the key was at 2",
            ),
            (
                "left wrongly",
                vec![put("a", 0, 1, 2), put_if("b", 2, 2, 3, 2, false)],
                events(&[Some("a")]),
                "did not apply, but",
            ),
            (
                "left and there",
                vec![put("a", 0, 1, 2), put_if("b", 1, 2, 3, 2, false)],
                ab.clone(),
                "did not apply and yet",
            ),
            (
                "deleted nothing where something was",
                vec![put("a", 0, 1, 2), delete(2, 3, 2, false)],
                events(&[Some("a")]),
                "found nothing",
            ),
            (
                "an unknown write before it was begun",
                vec![put("b", 5, 6, 3), unknown(put("a", 7, 8, 0))],
                ab.clone(),
                "does not know of it",
            ),
            (
                "several, one of them lost",
                vec![put_all(&["a", "b"], 0, 1, 2)],
                vec![event(2, "k", "a")],
                "the history has None",
            ),
            (
                "several, at two revisions",
                vec![put_all(&["a", "b"], 0, 1, 2)],
                vec![event(2, "k", "a"), event(3, "l", "b")],
                "the history has None",
            ),
            (
                "several, unknown, one of them lost",
                vec![unknown(put_all(&["a", "b"], 0, 1, 0))],
                vec![event(2, "k", "a")],
                "in part",
            ),
            (
                "several, unknown, at two revisions",
                vec![unknown(put_all(&["a", "b", "c"], 0, 1, 0))],
                vec![event(2, "k", "a"), event(2, "l", "b"), event(3, "m", "c")],
                "in part",
            ),
            (
                "several, unknown, before they were begun",
                vec![put("x", 0, 1, 3), unknown(put_all(&["a", "b"], 2, 3, 0))],
                vec![event(2, "k", "a"), event(2, "l", "b"), event(3, "k", "x")],
                "does not know of it",
            ),
            (
                "several, refused and there",
                vec![refused(put_all(&["a", "b"], 0, 1, 0))],
                vec![event(2, "k", "a"), event(2, "l", "b")],
                "was refused",
            ),
            (
                "several, with each other's values",
                vec![unknown(put_all(&["a", "b"], 0, 1, 0))],
                vec![event(2, "k", "b"), event(2, "l", "a")],
                "at another key",
            ),
            (
                "an old state that never was",
                vec![put("a", 0, 1, 2), put("b", 2, 3, 3), old(get(Some(("b", 3)), 4, 5, 2))],
                ab,
                "there was",
            ),
        ];
        for (name, ops, events, text) in bad {
            let found = check(&ops, &events).expect_err(name);
            assert!(found.contains(text), "{name}: {found}");
        }
    }
}
