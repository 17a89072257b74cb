//! Finds the watchers of a key.
//!
//! Single keys are in a hash map. Ranges are in a treap ordered by (start, end), each node of which knows how far the
//! ranges below it reach: finding the k ranges around a key among n takes about k · log n steps, adding and removing
//! log n. Equal ranges share one node, and equal keys one entry. The map is only asked, never walked, so its random
//! order shows nowhere.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    slab::{Slab, Slot},
    watcher::SharedRange,
};
use crate::sim::HashMap;

#[derive(Debug, Default)]
pub(super) struct KeyIndex {
    single: HashMap<Arc<[u8]>, Slots>,
    ranges: RangeTree,
}

impl KeyIndex {
    /// Adds a watcher; returns `range`, sharing its bytes with what is here already.
    pub fn insert(&mut self, range: SharedRange, slot: Slot) -> SharedRange {
        if !range.as_range().is_single() {
            return self.ranges.insert(range, slot);
        }
        match self.single.get_key_value(&range.key) {
            Some((key, _)) => {
                let key = key.clone();
                self.single.get_mut(&key).expect("the key was just found").insert(slot);
                SharedRange { key, ..range }
            }
            None => {
                self.single.insert(range.key.clone(), Slots::One(slot));
                range
            }
        }
    }

    pub fn remove(&mut self, range: &SharedRange, slot: Slot) {
        if !range.as_range().is_single() {
            return self.ranges.remove(range, slot);
        }
        let slots = self.single.get_mut(&range.key).expect("an indexed watcher's key is in the map");
        if slots.remove(slot) {
            self.single.remove(&range.key);
        }
    }

    /// Calls `found` for each watcher whose range holds `key`.
    pub fn visit(&self, key: &[u8], mut found: impl FnMut(Slot)) {
        if let Some(slots) = self.single.get(key) {
            slots.visit(&mut found);
        }
        self.ranges.visit(self.ranges.root, key, &mut found);
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.single.is_empty() && self.ranges.root == NONE
    }
}

/// The watchers of one key or range: mostly one.
#[derive(Debug)]
enum Slots {
    One(Slot),
    // Boxed to keep the common case small.
    #[allow(clippy::box_collection)]
    Many(Box<BTreeSet<Slot>>),
}

impl Slots {
    fn insert(&mut self, slot: Slot) {
        match self {
            Slots::One(first) => *self = Slots::Many(Box::new(BTreeSet::from([*first, slot]))),
            Slots::Many(slots) => _ = slots.insert(slot),
        }
    }

    /// Returns whether none is left.
    fn remove(&mut self, slot: Slot) -> bool {
        match self {
            Slots::One(only) => {
                assert_eq!(*only, slot, "the index knows the watcher");
                true
            }
            Slots::Many(slots) => {
                assert!(slots.remove(&slot), "the index knows the watcher");
                slots.is_empty()
            }
        }
    }

    fn visit(&self, found: &mut impl FnMut(Slot)) {
        match self {
            Slots::One(slot) => found(*slot),
            Slots::Many(slots) => slots.iter().copied().for_each(found),
        }
    }
}

/// No node.
const NONE: Slot = Slot::MAX;

#[derive(Debug)]
struct Node {
    range: SharedRange,
    /// The farthest end in this sub-tree, `"\0"` for no end.
    max_end: Arc<[u8]>,
    /// Heap order: no child's is higher. Spread evenly, they keep the tree about 2 · log n deep.
    priority: u64,
    left: Slot,
    right: Slot,
    slots: Slots,
}

#[derive(Debug)]
struct RangeTree {
    nodes: Slab<Node>,
    root: Slot,
    /// Counts insertions; priorities are derived from it.
    insertions: u64,
}

impl Default for RangeTree {
    fn default() -> Self {
        Self { nodes: Slab::default(), root: NONE, insertions: 0 }
    }
}

impl RangeTree {
    fn visit(&self, at: Slot, key: &[u8], found: &mut impl FnMut(Slot)) {
        if at == NONE {
            return;
        }
        let node = &self.nodes[at];
        if !ends_after(&node.max_end, key) {
            return;
        }
        self.visit(node.left, key, found);
        if *node.range.key <= *key {
            if ends_after(&node.range.end, key) {
                node.slots.visit(found);
            }
            self.visit(node.right, key, found);
        }
    }

    fn find(&self, range: &SharedRange) -> Slot {
        let mut at = self.root;
        while at != NONE {
            let node = &self.nodes[at];
            at = match range.cmp(&node.range) {
                std::cmp::Ordering::Less => node.left,
                std::cmp::Ordering::Greater => node.right,
                std::cmp::Ordering::Equal => return at,
            };
        }
        NONE
    }

    fn insert(&mut self, range: SharedRange, slot: Slot) -> SharedRange {
        let found = self.find(&range);
        if found != NONE {
            let node = &mut self.nodes[found];
            node.slots.insert(slot);
            return node.range.clone();
        }
        self.insertions += 1;
        let node = Node {
            max_end: range.end.clone(),
            priority: super::hub::spread(self.insertions),
            left: NONE,
            right: NONE,
            slots: Slots::One(slot),
            range: range.clone(),
        };
        let at = self.nodes.insert(node);
        let (less, greater) = self.split(self.root, &range);
        let left = self.merge(less, at);
        self.root = self.merge(left, greater);
        range
    }

    fn remove(&mut self, range: &SharedRange, slot: Slot) {
        let at = self.find(range);
        assert_ne!(at, NONE, "an indexed watcher's range is in the tree");
        if self.nodes[at].slots.remove(slot) {
            self.root = self.unlink(self.root, range);
            self.nodes.remove(at);
        }
    }

    /// Takes the node of `range` out of the sub-tree at `at`; returns what is left.
    fn unlink(&mut self, at: Slot, range: &SharedRange) -> Slot {
        let (left, right) = (self.nodes[at].left, self.nodes[at].right);
        match range.cmp(&self.nodes[at].range) {
            std::cmp::Ordering::Equal => return self.merge(left, right),
            std::cmp::Ordering::Less => self.nodes[at].left = self.unlink(left, range),
            std::cmp::Ordering::Greater => self.nodes[at].right = self.unlink(right, range),
        }
        self.update(at);
        at
    }

    /// Parts a sub-tree into the ranges below and above `range`.
    fn split(&mut self, at: Slot, range: &SharedRange) -> (Slot, Slot) {
        if at == NONE {
            return (NONE, NONE);
        }
        if self.nodes[at].range < *range {
            let (less, greater) = self.split(self.nodes[at].right, range);
            self.nodes[at].right = less;
            self.update(at);
            (at, greater)
        } else {
            let (less, greater) = self.split(self.nodes[at].left, range);
            self.nodes[at].left = greater;
            self.update(at);
            (less, at)
        }
    }

    /// Joins two sub-trees, all ranges of `a` being below those of `b`.
    fn merge(&mut self, a: Slot, b: Slot) -> Slot {
        if a == NONE || b == NONE {
            return if a == NONE { b } else { a };
        }
        if self.nodes[a].priority >= self.nodes[b].priority {
            let right = self.merge(self.nodes[a].right, b);
            self.nodes[a].right = right;
            self.update(a);
            a
        } else {
            let left = self.merge(a, self.nodes[b].left);
            self.nodes[b].left = left;
            self.update(b);
            b
        }
    }

    /// Derives `max_end` from the node and its children.
    fn update(&mut self, at: Slot) {
        let node = &self.nodes[at];
        let mut max_end = &node.range.end;
        for child in [node.left, node.right] {
            if child != NONE && reaches_farther(&self.nodes[child].max_end, max_end) {
                max_end = &self.nodes[child].max_end;
            }
        }
        let max_end = max_end.clone();
        self.nodes[at].max_end = max_end;
    }
}

fn is_open(end: &[u8]) -> bool {
    end == [0]
}

/// True if a range with this end, starting at or before `key`, holds `key`.
fn ends_after(end: &[u8], key: &[u8]) -> bool {
    is_open(end) || key < end
}

fn reaches_farther(end: &[u8], than: &[u8]) -> bool {
    !is_open(than) && (is_open(end) || end > than)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::mvcc::KeyRange;

    fn found(index: &KeyIndex, key: &[u8]) -> Vec<Slot> {
        let mut slots = Vec::new();
        index.visit(key, |slot| slots.push(slot));
        slots.sort_unstable();
        slots
    }

    #[test]
    fn finds_what_a_scan_of_all_ranges_finds() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut index = KeyIndex::default();
        let mut all: Vec<(SharedRange, Slot)> = Vec::new();
        for step in 0..6000u32 {
            if all.is_empty() || rng.random_bool(0.55) {
                let key = [rng.random_range(b'a'..=b'f'), rng.random_range(b'a'..=b'z')];
                let key = &key[..rng.random_range(1..=2)];
                let end: &[u8] = match rng.random_range(0..4) {
                    0 => &[],
                    1 => &[0],
                    _ => &[rng.random_range(b'a'..=b'g'), rng.random_range(b'a'..=b'z')],
                };
                let range = SharedRange::new(KeyRange::new(key, end));
                if range.as_range().is_empty() {
                    continue;
                }
                all.push((index.insert(range, step), step));
            } else {
                let (range, slot) = all.swap_remove(rng.random_range(0..all.len()));
                index.remove(&range, slot);
            }
            let key = [rng.random_range(b'`'..=b'g'), rng.random_range(b'a'..=b'z')];
            let key = &key[..rng.random_range(1..=2)];
            let mut expected: Vec<_> =
                all.iter().filter(|(range, _)| range.as_range().contains(key)).map(|(_, slot)| *slot).collect();
            expected.sort_unstable();
            assert_eq!(found(&index, key), expected, "step {step} key {key:?}");
        }
        for (range, slot) in all {
            index.remove(&range, slot);
        }
        assert!(index.is_empty());
    }

    #[test]
    fn ten_thousand_nested_and_disjoint_ranges_stay_shallow() {
        let mut tree = RangeTree::default();
        for n in 0..10_000u32 {
            let key = format!("k{n:05}");
            tree.insert(SharedRange::new(KeyRange::new(key.as_bytes(), &[0xff])), n);
        }
        fn depth(tree: &RangeTree, at: Slot) -> usize {
            if at == NONE { 0 } else { 1 + depth(tree, tree.nodes[at].left).max(depth(tree, tree.nodes[at].right)) }
        }
        assert!(depth(&tree, tree.root) < 60, "{}", depth(&tree, tree.root));
    }
}
