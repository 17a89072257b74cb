//! Nodes of the tree: leaves of packed keys with their histories, inner nodes of counted children.
//!
//! A node never changes while more than one owner holds it: [`Arc::make_mut`] copies it first, so a change copies the
//! path from the root to one leaf once per published view and then works in place. All leaves are at one depth.
//! A node that outgrows its bound is split. Only clean-up takes keys away; every child it touches is dropped when
//! empty and joined with a neighbour when both fit three quarters of a node, so a node is sparse only beside full ones.

use std::sync::Arc;

use bytes::Bytes;

use super::keys::{Keys, common_prefix};
use crate::mvcc::{
    Revision,
    history::{History, Row},
};

/// Keys in a leaf. A put copies half of this on average when the leaf is shared, about 3 KiB.
pub(super) const LEAF_KEYS: usize = if cfg!(test) { 8 } else { 32 };
/// A leaf of several keys is split beyond so many bytes of keys, so that long keys do not make copies long.
pub(super) const LEAF_KEY_BYTES: usize = if cfg!(test) { 200 } else { 8 << 10 };
/// Children of an inner node. Low, because copying a node touches the reference count of each child, a cache miss.
pub(super) const INNER_CHILDREN: usize = if cfg!(test) { 4 } else { 16 };

/// What a sub-tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    pub keys: usize,
    /// Keys whose newest row is a put.
    pub alive: usize,
    pub rows: usize,
    /// Main revision of the newest change of the keys held; 0: no keys.
    pub changed: i64,
}

impl Summary {
    fn add(&mut self, other: &Summary) {
        self.keys += other.keys;
        self.alive += other.alive;
        self.rows += other.rows;
        self.changed = self.changed.max(other.changed);
    }

    /// Every key is alive with one row: no compaction finds anything here.
    fn is_clean(&self) -> bool {
        self.rows == self.alive
    }
}

/// A sub-tree with its summary.
#[derive(Clone)]
pub(super) struct Child {
    pub node: Arc<Node>,
    pub sum: Summary,
}

#[derive(Clone)]
pub(super) enum Node {
    Leaf(Leaf),
    Inner(Inner),
}

#[derive(Clone, Default)]
pub(super) struct Leaf {
    /// Ascending.
    pub keys: Keys,
    pub histories: Vec<History>,
}

#[derive(Clone)]
pub(super) struct Inner {
    /// One less than children: the keys of child `i` are at or above `bounds[i - 1]` and below `bounds[i]`. A bound is
    /// the shortest string that told the two apart when they were split.
    pub bounds: Keys,
    pub children: Vec<Child>,
}

/// The part of a key range that concerns a sub-tree; `None`: it does not end inside.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub from: Option<&'a [u8]>,
    pub to: Option<&'a [u8]>,
}

/// A node was split: this belongs to its right.
pub(super) struct Split {
    bound: Vec<u8>,
    right: Child,
}

/// One change: the row that was the newest, and the one that is now.
pub(super) struct Recorded {
    pub before: Option<Row>,
    pub now: Row,
}

/// What a search for something to clean up ended with.
pub(super) enum Scan {
    /// Nothing from the cursor on.
    Done,
    /// Looked at as many keys as allowed; go on here.
    Spent(Vec<u8>),
    /// This key has condemned rows.
    Found(Vec<u8>),
}

/// Bounds of a slice of clean-up.
pub(super) struct Slice<'a> {
    pub at: i64,
    /// Keys that may still be looked at; a removed row counts as one more.
    pub left: usize,
    pub removed: &'a mut Vec<(Revision, bool, u32)>,
}

impl Default for Child {
    fn default() -> Self {
        Self::new(Node::Leaf(Leaf::default()))
    }
}

impl Child {
    fn new(node: Node) -> Self {
        let sum = node.summary();
        Self { node: Arc::new(node), sum }
    }

    pub fn find(&self, key: &[u8]) -> Option<&History> {
        let mut node = &*self.node;
        loop {
            match node {
                Node::Leaf(leaf) => return leaf.keys.search(key).ok().map(|i| &leaf.histories[i]),
                Node::Inner(inner) => node = &inner.children[inner.bounds.at_or_below(key)].node,
            }
        }
    }

    pub fn count(&self, span: Span<'_>, at: i64) -> usize {
        if span.is_all() && self.sum.changed <= at {
            return self.sum.alive;
        }
        match &*self.node {
            Node::Leaf(leaf) => leaf.histories[leaf.range(span)].iter().filter(|history| alive_at(history, at)).count(),
            Node::Inner(inner) => inner.parts(span).map(|(child, span)| child.count(span, at)).sum(),
        }
    }

    /// False: the visitor wants no more.
    pub fn visit(&self, span: Span<'_>, at: i64, visit: &mut dyn FnMut(&[u8], Row) -> bool) -> bool {
        if self.sum.alive == 0 && self.sum.changed <= at {
            return true;
        }
        match &*self.node {
            Node::Leaf(leaf) => leaf.range(span).all(|i| match leaf.histories[i].at(at) {
                Some(row) if !row.tombstone => visit(leaf.keys.get(i), row),
                _ => true,
            }),
            Node::Inner(inner) => inner.parts(span).all(|(child, span)| child.visit(span, at, visit)),
        }
    }

    /// Collects the changes with `from` <= main <= `to`.
    pub fn changes(&self, span: Span<'_>, from: i64, to: i64, found: &mut Vec<(Revision, bool, Bytes)>) {
        if self.sum.changed < from {
            return;
        }
        match &*self.node {
            Node::Leaf(leaf) => {
                for i in leaf.range(span) {
                    let mut key = None;
                    for row in leaf.histories[i].up_to(to).take_while(|row| row.revision.main >= from) {
                        let key = key.get_or_insert_with(|| Bytes::copy_from_slice(leaf.keys.get(i)));
                        found.push((row.revision, row.tombstone, key.clone()));
                    }
                }
            }
            Node::Inner(inner) => {
                for (child, span) in inner.parts(span) {
                    child.changes(span, from, to, found);
                }
            }
        }
    }

    pub fn each(&self, visit: &mut dyn FnMut(&History)) {
        match &*self.node {
            Node::Leaf(leaf) => leaf.histories.iter().for_each(visit),
            Node::Inner(inner) => inner.children.iter().for_each(|child| child.each(visit)),
        }
    }

    /// Adds the row that `next` makes of the newest one.
    pub fn record(&mut self, key: &[u8], next: impl FnOnce(Option<Row>) -> Row) -> (Recorded, Option<Split>) {
        let node = Arc::make_mut(&mut self.node);
        let (recorded, split) = match node {
            Node::Leaf(leaf) => leaf.record(key, next),
            Node::Inner(inner) => inner.record(key, next),
        };
        if split.is_some() {
            self.sum = node.summary();
        } else {
            let Recorded { before, now } = &recorded;
            self.sum.keys += usize::from(before.is_none());
            self.sum.rows += 1;
            self.sum.alive += usize::from(!now.tombstone);
            self.sum.alive -= usize::from(before.is_some_and(|row| !row.tombstone));
            self.sum.changed = now.revision.main;
        }
        (recorded, split)
    }

    /// The root was split: a level more.
    pub fn grow(&mut self, split: Split) {
        let bounds = Keys::new([&split.bound[..]]);
        let children = vec![std::mem::take(self), split.right];
        *self = Self::new(Node::Inner(Inner { bounds, children }));
    }

    /// The root lost keys: levels that do not branch go.
    pub fn shrink(&mut self) {
        if self.sum.keys == 0 {
            *self = Self::default();
        }
        while let Node::Inner(inner) = &*self.node
            && let [only] = &inner.children[..]
        {
            *self = only.clone();
        }
    }

    /// Collects the revisions with main <= `to` that a compaction at `at` condemns.
    pub fn condemned(&self, at: i64, to: i64, found: &mut Vec<Revision>) {
        if self.sum.is_clean() {
            return;
        }
        match &*self.node {
            Node::Leaf(leaf) => {
                for history in &leaf.histories {
                    found.extend(history.condemned(at).filter(|revision| revision.main <= to));
                }
            }
            Node::Inner(inner) => inner.children.iter().for_each(|child| child.condemned(at, to, found)),
        }
    }

    /// Looks for a key with something to clean up, from `from` on; `left` keys may be looked at.
    pub fn scan(&self, from: Option<&[u8]>, at: i64, left: &mut usize) -> Scan {
        if self.sum.is_clean() {
            return Scan::Done;
        }
        let span = Span { from, to: None };
        match &*self.node {
            Node::Leaf(leaf) => {
                for i in leaf.range(span) {
                    if *left == 0 {
                        return Scan::Spent(leaf.keys.get(i).to_vec());
                    }
                    *left -= 1;
                    if leaf.histories[i].has_condemned(at) {
                        return Scan::Found(leaf.keys.get(i).to_vec());
                    }
                }
                Scan::Done
            }
            Node::Inner(inner) => {
                for (child, span) in inner.parts(span) {
                    match child.scan(span.from, at, left) {
                        Scan::Done => {}
                        found => return found,
                    }
                }
                Scan::Done
            }
        }
    }

    /// Cleans up `key` and on to the end of its leaf while the slice allows. Returns where to go on; `None`: this was
    /// the last leaf of the sub-tree.
    pub fn compact(&mut self, key: &[u8], slice: &mut Slice<'_>) -> Option<Vec<u8>> {
        let node = Arc::make_mut(&mut self.node);
        let next = match node {
            Node::Leaf(leaf) => leaf.compact(key, slice),
            Node::Inner(inner) => {
                let i = inner.bounds.at_or_below(key);
                let next = inner.children[i].compact(key, slice);
                let next = next.or_else(|| (i < inner.bounds.len()).then(|| inner.bounds.get(i).to_vec()));
                inner.mend(i);
                next
            }
        };
        self.sum = node.summary();
        next
    }
}

impl Node {
    pub fn summary(&self) -> Summary {
        let mut sum = Summary::default();
        match self {
            Node::Leaf(leaf) => {
                for history in &leaf.histories {
                    sum.add(&Summary {
                        keys: 1,
                        alive: usize::from(history.is_alive()),
                        rows: history.row_count(),
                        changed: history.newest().revision.main,
                    });
                }
            }
            Node::Inner(inner) => inner.children.iter().for_each(|child| sum.add(&child.sum)),
        }
        sum
    }
}

impl Leaf {
    fn range(&self, span: Span<'_>) -> std::ops::Range<usize> {
        let from = span.from.map_or(0, |key| self.keys.below(key));
        let to = span.to.map_or(self.keys.len(), |key| self.keys.below(key));
        from..to.max(from)
    }

    fn record(&mut self, key: &[u8], next: impl FnOnce(Option<Row>) -> Row) -> (Recorded, Option<Split>) {
        match self.keys.search(key) {
            Ok(i) => {
                let before = Some(self.histories[i].newest());
                let now = next(before);
                self.histories[i].push(now);
                (Recorded { before, now }, None)
            }
            Err(i) => {
                let now = next(None);
                self.keys.insert(i, key);
                super::insert_tight(&mut self.histories, i, History::new(now));
                (Recorded { before: None, now }, self.split_if_full(i))
            }
        }
    }

    /// `inserted` is the position of the new key. At the end it is likely the first of an ascending run, which fills
    /// the right half only: then most stay left.
    fn split_if_full(&mut self, inserted: usize) -> Option<Split> {
        let len = self.keys.len();
        if len <= LEAF_KEYS && (self.keys.byte_len() <= LEAF_KEY_BYTES || len == 1) {
            return None;
        }
        let weight = |key: &[u8]| size_of::<History>() + 2 * size_of::<u32>() + key.len();
        let total: usize = self.keys.iter().map(weight).sum();
        let left_share = if inserted == len - 1 { total / 8 * 7 } else { total / 2 };
        let mut left = 0;
        let mut weight_left = 0;
        while weight_left < left_share {
            weight_left += weight(self.keys.get(left));
            left += 1;
        }
        let left = left.clamp(1, len - 1);
        let bound = shortest_between(self.keys.get(left - 1), self.keys.get(left)).to_vec();
        let histories = self.histories.split_off(left);
        self.histories.shrink_to_fit();
        let right = Leaf { keys: self.keys.split_off(left), histories };
        Some(Split { bound, right: Child::new(Node::Leaf(right)) })
    }

    fn compact(&mut self, key: &[u8], slice: &mut Slice<'_>) -> Option<Vec<u8>> {
        let first = self.keys.below(key);
        let mut next = None;
        let mut gone = Vec::new();
        for i in first..self.keys.len() {
            if i > first {
                // The first was paid for by the scan that found it.
                if slice.left == 0 {
                    next = Some(self.keys.get(i).to_vec());
                    break;
                }
                slice.left -= 1;
            }
            if self.histories[i].has_condemned(slice.at) {
                let removed = slice.removed.len();
                if !self.histories[i].compact(slice.at, slice.removed) {
                    gone.push(i);
                }
                slice.left = slice.left.saturating_sub(slice.removed.len() - removed);
            }
        }
        self.remove(&gone);
        next
    }

    fn remove(&mut self, gone: &[usize]) {
        if gone.is_empty() {
            return;
        }
        let rest: Vec<usize> = (0..self.keys.len()).filter(|i| gone.binary_search(i).is_err()).collect();
        self.histories = rest.iter().map(|&i| self.histories[i].clone()).collect();
        self.keys = Keys::new(rest.iter().map(|&i| self.keys.get(i)));
    }
}

impl Inner {
    /// The children that `span` touches, each with its part of the span.
    fn parts<'a>(&'a self, span: Span<'a>) -> impl Iterator<Item = (&'a Child, Span<'a>)> {
        let first = span.from.map_or(0, |key| self.bounds.at_or_below(key));
        let last = span.to.map_or(self.bounds.len(), |key| self.bounds.below(key));
        (first..=last).map(move |i| {
            let from = span.from.filter(|_| i == first);
            let to = span.to.filter(|_| i == last);
            (&self.children[i], Span { from, to })
        })
    }

    fn record(&mut self, key: &[u8], next: impl FnOnce(Option<Row>) -> Row) -> (Recorded, Option<Split>) {
        let i = self.bounds.at_or_below(key);
        let (recorded, split) = self.children[i].record(key, next);
        let Some(Split { bound, right }) = split else { return (recorded, None) };
        self.bounds.insert(i, &bound);
        super::insert_tight(&mut self.children, i + 1, right);
        (recorded, self.split_if_full(i + 1))
    }

    /// As in a leaf, an insertion at the end leaves most of the children left.
    fn split_if_full(&mut self, inserted: usize) -> Option<Split> {
        let len = self.children.len();
        if len <= INNER_CHILDREN {
            return None;
        }
        let left = if inserted == len - 1 { len - 2 } else { len / 2 };
        let children = self.children.split_off(left);
        self.children.shrink_to_fit();
        let bounds = self.bounds.split_off(left);
        let bound = self.bounds.get(left - 1).to_vec();
        self.bounds.remove(left - 1);
        Some(Split { bound, right: Child::new(Node::Inner(Inner { bounds, children })) })
    }

    /// After child `i` lost keys: drops it if empty, joins it with a neighbour if both are small.
    fn mend(&mut self, i: usize) {
        if self.children[i].sum.keys == 0 {
            self.children.remove(i);
            if self.bounds.len() > 0 {
                self.bounds.remove(i.saturating_sub(1));
            }
        } else if i + 1 < self.children.len() && self.fit_one(i) {
            self.join(i);
        } else if i > 0 && self.fit_one(i - 1) {
            self.join(i - 1);
        }
    }

    /// Whether child `i` and the one after it fit three quarters of a node.
    fn fit_one(&self, i: usize) -> bool {
        match (&*self.children[i].node, &*self.children[i + 1].node) {
            (Node::Leaf(left), Node::Leaf(right)) => {
                left.keys.len() + right.keys.len() <= LEAF_KEYS / 4 * 3
                    && left.keys.byte_len() + right.keys.byte_len() <= LEAF_KEY_BYTES / 4 * 3
            }
            (Node::Inner(left), Node::Inner(right)) => {
                left.children.len() + right.children.len() <= INNER_CHILDREN / 4 * 3
            }
            _ => unreachable!("all leaves are at one depth"),
        }
    }

    /// Joins child `i` with the one after it.
    fn join(&mut self, i: usize) {
        let right = self.children.remove(i + 1);
        let bound = self.bounds.get(i).to_vec();
        self.bounds.remove(i);
        let left = &mut self.children[i];
        match (Arc::make_mut(&mut left.node), &*right.node) {
            (Node::Leaf(left), Node::Leaf(right)) => {
                left.keys = Keys::new(left.keys.iter().chain(right.keys.iter()));
                left.histories.extend_from_slice(&right.histories);
            }
            (Node::Inner(left), Node::Inner(right)) => {
                left.bounds = Keys::new(left.bounds.iter().chain([&bound[..]]).chain(right.bounds.iter()));
                left.children.extend_from_slice(&right.children);
            }
            _ => unreachable!("all leaves are at one depth"),
        }
        left.sum.add(&right.sum);
    }
}

impl Span<'_> {
    fn is_all(&self) -> bool {
        self.from.is_none() && self.to.is_none()
    }
}

fn alive_at(history: &History, at: i64) -> bool {
    history.at(at).is_some_and(|row| !row.tombstone)
}

/// The shortest string above `left` and not above `right`, where `left` < `right`: a prefix of `right`.
fn shortest_between<'a>(left: &[u8], right: &'a [u8]) -> &'a [u8] {
    &right[..common_prefix(left, right) + 1]
}
