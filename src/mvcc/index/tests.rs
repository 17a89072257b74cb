//! The index beside a naive model: random histories, live index and old clones compared at random revisions.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::node::{INNER_CHILDREN, LEAF_KEYS, Node};
use super::*;

type Key = Vec<u8>;

fn rev(main: i64, sub: i64) -> Revision {
    Revision::new(main, sub)
}

fn index_of(puts: &[(&str, i64)]) -> Index {
    let mut index = Index::default();
    for (key, main) in puts {
        index.put(key.as_bytes(), rev(*main, 0), 10);
    }
    index
}

fn keys_at(index: &Index, range: KeyRange<'_>, at: i64) -> Vec<String> {
    let mut keys = Vec::new();
    index.visit(range, at, &mut |key, _| {
        keys.push(String::from_utf8_lossy(key).into_owned());
        true
    });
    keys
}

/// Compacts in slices of one key.
fn compact(index: &mut Index, at: i64) -> Vec<(Revision, bool, u32)> {
    let mut removed = Vec::new();
    let mut cursor = bytes::Bytes::new();
    while let Some(next) = index.compact_slice(at, &cursor, 1, &mut removed) {
        cursor = next;
    }
    removed.sort();
    removed
}

impl Index {
    /// Panics if the tree is not what its module heads say.
    fn check(&self) {
        fn walk(child: &Child, low: Option<&[u8]>, high: Option<&[u8]>, root: bool) -> usize {
            assert_eq!(child.sum, child.node.summary());
            match &*child.node {
                Node::Leaf(leaf) => {
                    assert_eq!(leaf.keys.len(), leaf.histories.len());
                    assert!(leaf.keys.len() <= LEAF_KEYS && (root || leaf.keys.len() > 0));
                    let keys: Vec<&[u8]> = leaf.keys.iter().collect();
                    assert!(keys.is_sorted_by(|a, b| a < b));
                    assert!(keys.iter().all(|key| low.is_none_or(|low| low <= *key)));
                    assert!(keys.iter().all(|key| high.is_none_or(|high| *key < high)));
                    for history in &leaf.histories {
                        let rows: Vec<Row> = history.up_to(i64::MAX).collect();
                        assert!(rows.is_sorted_by(|a, b| a.revision > b.revision));
                        assert_eq!(rows[0], history.newest());
                    }
                    0
                }
                Node::Inner(inner) => {
                    assert_eq!(inner.bounds.len() + 1, inner.children.len());
                    assert!(inner.children.len() <= INNER_CHILDREN && inner.children.len() >= if root { 2 } else { 1 });
                    let mut depths = (0..inner.children.len()).map(|i| {
                        let low = if i == 0 { low } else { Some(inner.bounds.get(i - 1)) };
                        let high = if i == inner.bounds.len() { high } else { Some(inner.bounds.get(i)) };
                        walk(&inner.children[i], low, high, false)
                    });
                    let depth = depths.next().unwrap();
                    assert!(depths.all(|other| other == depth), "all leaves are at one depth");
                    depth + 1
                }
            }
        }
        walk(&self.root, None, None, true);
    }

    fn leaf_count(&self) -> usize {
        fn walk(child: &Child) -> usize {
            match &*child.node {
                Node::Leaf(_) => 1,
                Node::Inner(inner) => inner.children.iter().map(walk).sum(),
            }
        }
        walk(&self.root)
    }
}

/// All rows of all keys, as the statements of the API talk about them.
#[derive(Clone, Default)]
struct Model {
    keys: BTreeMap<Key, Vec<Row>>,
    /// Reads below are not asked for.
    compacted: i64,
}

impl Model {
    fn at(rows: &[Row], at: i64) -> Option<Row> {
        rows.iter().rfind(|row| row.revision.main <= at).copied()
    }

    fn get(&self, key: &[u8], at: i64) -> Option<KeyMeta> {
        Self::at(self.keys.get(key)?, at).filter(|row| !row.tombstone).map(meta)
    }

    fn put(&mut self, key: &[u8], rev: Revision, bytes: u32) -> KeyMeta {
        let rows = self.keys.entry(key.to_vec()).or_default();
        let row = match rows.last() {
            Some(last) if !last.tombstone => Row::put(rev, last.created, last.version + 1, bytes),
            _ => Row::put(rev, rev.main, 1, bytes),
        };
        rows.push(row);
        meta(row)
    }

    fn delete(&mut self, key: &[u8], rev: Revision, bytes: u32) -> Option<KeyMeta> {
        let rows = self.keys.get_mut(key)?;
        let last = *rows.last().filter(|row| !row.tombstone)?;
        rows.push(Row::tombstone(rev, bytes));
        Some(meta(last))
    }

    fn visit(&self, range: KeyRange<'_>, at: i64) -> Vec<(Key, KeyMeta)> {
        let keys = self.keys.keys().filter(|key| range.contains(key));
        keys.filter_map(|key| Some((key.clone(), self.get(key, at)?))).collect()
    }

    fn changes(&self, range: KeyRange<'_>, from: i64, to: i64) -> Vec<(Revision, bool, bytes::Bytes)> {
        let mut all = Vec::new();
        for (key, rows) in self.keys.iter().filter(|(key, _)| range.contains(key)) {
            let rows = rows.iter().filter(|row| (from..=to).contains(&row.revision.main));
            all.extend(rows.map(|row| (row.revision, row.tombstone, bytes::Bytes::copy_from_slice(key))));
        }
        all.sort();
        all
    }

    fn compact(&mut self, at: i64) -> Vec<(Revision, bool, u32)> {
        let mut removed = Vec::new();
        for rows in self.keys.values_mut() {
            let newest = Self::at(rows, at).map(|row| row.revision);
            rows.retain(|row| {
                let stays = match row.revision.main {
                    main if main > at => true,
                    main if row.tombstone => main == at,
                    _ => Some(row.revision) == newest,
                };
                if !stays {
                    removed.push((row.revision, row.tombstone, row.bytes));
                }
                stays
            });
        }
        self.keys.retain(|_, rows| !rows.is_empty());
        self.compacted = at;
        removed.sort();
        removed
    }

    /// Word by word: lifetimes first, then the choice among them.
    fn keep(&self, at: i64) -> Vec<Revision> {
        let mut kept = Vec::new();
        for rows in self.keys.values() {
            let mut lifetimes: Vec<Vec<Row>> = vec![vec![]];
            for row in rows {
                lifetimes.last_mut().unwrap().push(*row);
                if row.tombstone {
                    lifetimes.push(vec![]);
                }
            }
            let open = lifetimes.len() - 1;
            let chosen = lifetimes[..open].iter().position(|rows| rows.last().unwrap().revision.main >= at);
            let lifetime = &lifetimes[chosen.unwrap_or(open)];
            if let Some(i) = lifetime.iter().rposition(|row| row.revision.main <= at)
                && !(chosen.is_some() && i == lifetime.len() - 1)
            {
                kept.push(lifetime[i].revision);
            }
        }
        kept.sort();
        kept
    }

    fn rows(&self) -> Vec<(Key, Row)> {
        let mut all: Vec<(Key, Row)> =
            self.keys.iter().flat_map(|(key, rows)| rows.iter().map(|row| (key.clone(), *row))).collect();
        all.sort_by_key(|(_, row)| row.revision);
        all
    }
}

struct World {
    rng: StdRng,
    key_space: u32,
    index: Index,
    model: Model,
    revision: i64,
    /// (at, cursor, removed so far)
    #[allow(clippy::type_complexity)]
    compacting: Option<(i64, bytes::Bytes, Vec<(Revision, bool, u32)>)>,
}

impl World {
    fn new(seed: u64, key_space: u32) -> Self {
        let (index, model) = Default::default();
        Self { rng: StdRng::seed_from_u64(seed), key_space, index, model, revision: 1, compacting: None }
    }

    /// Keys of uneven length, some a prefix of others, one very long one.
    fn key(&mut self) -> Key {
        let n = self.rng.random_range(0..self.key_space);
        match n % 7 {
            0 => format!("a/{n}").into_bytes(),
            1 => format!("a/{n}\0").into_bytes(),
            2 => format!("{n:09}").into_bytes(),
            3 if n < 40 => [b"long".repeat(50), vec![n as u8]].concat(),
            4 => vec![0xff, n as u8, (n >> 8) as u8],
            _ => format!("key-{n}-{}", "x".repeat(n as usize % 5)).into_bytes(),
        }
    }

    fn write(&mut self) {
        self.revision += self.rng.random_range(1..3);
        let count = if self.rng.random_ratio(1, 4) { self.rng.random_range(1..6) } else { 1 };
        for sub in 0..count {
            let (key, bytes) = (self.key(), self.rng.random_range(0..1000));
            let at = rev(self.revision, sub);
            if self.rng.random_ratio(2, 5) {
                assert_eq!(self.index.delete(&key, at, bytes), self.model.delete(&key, at, bytes));
            } else {
                assert_eq!(self.index.put(&key, at, bytes), self.model.put(&key, at, bytes));
            }
        }
    }

    /// Begins a compaction or carries the running one on by a slice.
    fn clean_up(&mut self) {
        let Some((at, cursor, removed)) = &mut self.compacting else {
            if self.model.compacted < self.revision {
                let at = self.rng.random_range(self.model.compacted + 1..=self.revision);
                // Reads below are over from here on, whatever the clean-up has reached.
                self.model.compacted = at;
                self.compacting = Some((at, bytes::Bytes::new(), Vec::new()));
            }
            return;
        };
        let keys = self.rng.random_range(0..20);
        match self.index.compact_slice(*at, cursor, keys, removed) {
            Some(next) => {
                assert!(next > *cursor, "a slice makes progress");
                *cursor = next;
            }
            None => {
                removed.sort();
                assert_eq!(*removed, self.model.compact(*at));
                self.compacting = None;
                assert_eq!(self.index.len(), self.model.keys.len());
            }
        }
    }

    fn compare(&mut self, index: &Index, model: &Model, newest: i64) {
        let at = self.rng.random_range(model.compacted.max(0)..=newest + 1);
        let (key, end) = (self.key(), self.key());
        let ends = [vec![], vec![0], end];
        let range = KeyRange::new(&key, &ends[self.rng.random_range(0..3)]);
        let range = if self.rng.random_ratio(1, 4) { KeyRange::ALL } else { range };
        assert_eq!(index.get(&key, at), model.get(&key, at), "KV-14: get at {at}");
        let expected = model.visit(range, at);
        assert_eq!(index.count(range, at), expected.len(), "KV-17: count of {range:?} at {at}");
        let limit = self.rng.random_range(1..=expected.len() + 1);
        let mut visited = Vec::new();
        index.visit(range, at, &mut |key, meta| {
            visited.push((key.to_vec(), meta));
            visited.len() < limit
        });
        assert_eq!(visited, expected[..limit.min(expected.len())], "KV-14: visit of {range:?} at {at}");
        // Changes at or below the compact revision depend on how far the clean-up is.
        let from = self.rng.random_range(model.compacted + 1..=newest + 2);
        let to = self.rng.random_range(from..=newest + 2);
        assert_eq!(index.changes(range, from, to), model.changes(range, from, to), "changes {from}..={to}");
        assert_eq!(index.keep(at), model.keep(at), "keep at {at}");
    }

    fn run(&mut self, steps: usize) {
        let mut clones: Vec<(Index, Model, i64)> = Vec::new();
        for step in 0..steps {
            match self.rng.random_range(0..20) {
                0..12 => self.write(),
                12..15 => self.clean_up(),
                15 => {
                    let clone = (self.index.clone(), self.model.clone(), self.revision);
                    let slot = self.rng.random_range(0..4);
                    if slot < clones.len() { clones[slot] = clone } else { clones.push(clone) }
                }
                16 if step % 4 == 0 && self.compacting.is_none() => self.restore(),
                _ => {
                    let (index, model, newest) = (self.index.clone(), self.model.clone(), self.revision);
                    self.compare(&index, &model, newest);
                    for (index, model, newest) in &clones {
                        self.compare(index, model, *newest);
                    }
                    if step % 5 == 0 {
                        index.check();
                        clones.iter().for_each(|(index, ..)| index.check());
                    }
                }
            }
        }
    }

    /// The index that a restart would build from the rows is the same one.
    fn restore(&mut self) {
        let mut index = Index::default();
        for (key, row) in self.model.rows() {
            if row.tombstone {
                index.restore_delete(&key, row.revision, row.bytes);
            } else {
                index.restore_put(&key, row.revision, row.created, row.version, row.bytes);
            }
        }
        index.check();
        assert_eq!(index.len(), self.model.keys.len());
        self.index = index;
    }
}

/// `INDEX_SEED` runs that seed alone.
fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let one = std::env::var("INDEX_SEED").ok().and_then(|seed| seed.parse().ok());
    let (first, count) = one.map_or((0, count), |seed| (seed, 1));
    (first..first + count).inspect(|seed| println!("seed {seed}"))
}

// KV-14, KV-17, KV-79, KV-80, KV-87
#[test]
fn few_keys_behave_as_the_model() {
    for seed in seeds(30) {
        World::new(seed, 6).run(1_500);
    }
}

// KV-14, KV-17, KV-79, KV-80, KV-87
#[test]
fn many_keys_behave_as_the_model() {
    for seed in seeds(5) {
        World::new(seed, 400).run(1_500);
    }
}

#[test]
fn clones_may_be_read_on_other_threads() {
    fn is_shared<T: Send + Sync + Clone>() {}
    is_shared::<Index>();
}

// KV-14
#[test]
fn pinned_read_sees_whole_revisions_with_metadata_of_then() {
    let mut index = index_of(&[("k", 2), ("k", 3)]);
    index.delete(b"k", rev(4, 0), 18);
    let born_again = index.put(b"k", rev(4, 1), 20);
    assert_eq!(index.get(b"k", 1), None);
    assert_eq!(index.get(b"k", 3), Some(KeyMeta { modified: rev(3, 0), created: 2, version: 2, row_bytes: 10 }));
    assert_eq!(index.get(b"k", 4), Some(KeyMeta { modified: rev(4, 1), created: 4, version: 1, row_bytes: 20 }));
    assert_eq!(index.get(b"k", i64::MAX), Some(born_again));
    assert_eq!(index.delete(b"k", rev(5, 0), 18), Some(born_again));
    assert_eq!(index.delete(b"k", rev(6, 0), 18), None);
    assert_eq!(index.get(b"k", 6), None);
    assert_eq!(index.changes(KeyRange::ALL, 5, 9).len(), 1, "a delete of nothing leaves no trace");
}

// KV-17
#[test]
fn count_does_not_depend_on_limit() {
    let index = index_of(&[("a", 2), ("b", 3), ("c", 4), ("d", 5), ("e", 6)]);
    assert_eq!(index.count(KeyRange::ALL, 6), 5);
    assert_eq!(index.count(KeyRange::ALL, 4), 3);
    let mut seen = 0;
    index.visit(KeyRange::ALL, 6, &mut |_, _| {
        seen += 1;
        seen < 2
    });
    assert_eq!(seen, 2);
}

#[test]
fn ranges_are_read_as_the_api_says() {
    let index = index_of(&[("a", 2), ("ab", 3), ("b", 4), ("c", 5)]);
    for (key, end, expected) in [
        ("a", "", &["a"][..]),
        ("aa", "", &[]),
        ("a", "b", &["a", "ab"]),
        ("a\0", "c", &["ab", "b"]),
        ("b", "\0", &["b", "c"]),
        ("\0", "\0", &["a", "ab", "b", "c"]),
        ("b", "b", &[]),
        ("c", "a", &[]),
        ("d", "\0", &[]),
    ] {
        let range = KeyRange::new(key.as_bytes(), end.as_bytes());
        assert_eq!(keys_at(&index, range, 5), expected, "{range:?}");
        assert_eq!(index.count(range, 5), expected.len(), "{range:?}");
        assert_eq!(index.changes(range, 0, 5).len(), expected.len(), "{range:?}");
    }
    assert_eq!(Index::default().count(KeyRange::ALL, 5), 0);
    assert!(Index::default().is_empty());
}

// KV-79, KV-87; limits 11
#[test]
fn compaction_keeps_what_is_readable_at_its_revision() {
    let mut index = index_of(&[("a", 2), ("a", 3), ("b", 4)]);
    index.delete(b"b", rev(5, 0), 18);
    index.put(b"a", rev(6, 0), 30);
    index.put(b"c", rev(7, 0), 40);
    let before = index.clone();
    assert_eq!(
        compact(&mut index, 6),
        [(rev(2, 0), false, 10), (rev(3, 0), false, 10), (rev(4, 0), false, 10), (rev(5, 0), true, 18)]
    );
    assert_eq!(index.get(b"a", 6), Some(KeyMeta { modified: rev(6, 0), created: 2, version: 3, row_bytes: 30 }));
    assert_eq!(keys_at(&index, KeyRange::ALL, 6), ["a"]);
    assert_eq!(index.len(), 2, "b has left the tree");
    assert_eq!(before.get(b"a", 3).unwrap().version, 2, "a view taken before reads on");
    assert_eq!(compact(&mut index, 6), []);
    index.check();
}

// KV-80, H-10; limits 11
#[test]
fn tombstone_at_the_compact_revision_stays_for_watchers() {
    let mut index = index_of(&[("k", 2), ("k", 3), ("k", 4)]);
    index.delete(b"k", rev(5, 0), 18);
    index.put(b"k", rev(6, 0), 10);
    let removed = compact(&mut index, 5);
    assert!(removed.iter().map(|(revision, ..)| revision.main).eq(2..5));
    let changes = index.changes(KeyRange::ALL, 5, 6);
    assert_eq!(changes, [(rev(5, 0), true, "k".into()), (rev(6, 0), false, "k".into())]);
    assert_eq!(index.get(b"k", 5), None);
    // KV-80: a later compaction removes it.
    assert_eq!(compact(&mut index, 6), [(rev(5, 0), true, 18)]);
}

// KV-80
#[test]
fn dead_key_leaves_with_the_compaction_after_its_tombstone() {
    let mut index = index_of(&[("k", 2)]);
    index.delete(b"k", rev(3, 0), 18);
    index.put(b"other", rev(4, 0), 10);
    compact(&mut index, 3);
    assert_eq!((index.len(), index.count(KeyRange::ALL, 4)), (2, 1));
    compact(&mut index, 4);
    assert_eq!(index.len(), 1);
}

// limits 13, step 4
#[test]
fn hash_set_takes_the_lifetime_that_was_open() {
    let mut index = index_of(&[("a", 2), ("b", 3), ("a", 4)]);
    index.delete(b"a", rev(5, 0), 18);
    index.put(b"a", rev(6, 0), 10);
    index.put(b"c", rev(7, 0), 10);
    index.delete(b"c", rev(7, 1), 18);
    index.put(b"c", rev(7, 2), 10);
    assert_eq!(index.keep(1), []);
    assert_eq!(index.keep(3), [rev(2, 0), rev(3, 0)]);
    assert_eq!(index.keep(4), [rev(3, 0), rev(4, 0)]);
    assert_eq!(index.keep(5), [rev(3, 0)], "a closing tombstone is not kept");
    assert_eq!(index.keep(6), [rev(3, 0), rev(6, 0)]);
    assert_eq!(index.keep(7), [rev(3, 0), rev(6, 0)], "the lifetime of c that ends at 7 comes first");
    assert_eq!(index.keep(8), [rev(3, 0), rev(6, 0), rev(7, 2)]);
    // The clean-up does not change the set from its revision on.
    for at in 2..8 {
        let mut clean = index.clone();
        compact(&mut clean, at);
        for asked in at..=8 {
            assert_eq!(clean.keep(asked), index.keep(asked), "compacted at {at}, asked for {asked}");
        }
    }
}

#[test]
fn restored_key_goes_on_from_its_row() {
    let mut index = Index::default();
    index.restore_delete(b"dead", rev(8, 0), 18);
    index.restore_put(b"k", rev(9, 2), 4, 1 << 33, 50);
    let meta = KeyMeta { modified: rev(9, 2), created: 4, version: 1 << 33, row_bytes: 50 };
    assert_eq!(index.get(b"k", 9), Some(meta));
    assert_eq!(index.get(b"k", 8), None);
    assert_eq!(index.get(b"dead", 9), None);
    assert_eq!(index.put(b"k", rev(10, 0), 51).version, (1 << 33) + 1);
    assert_eq!(
        index.put(b"dead", rev(11, 0), 51),
        KeyMeta { modified: rev(11, 0), created: 11, version: 1, row_bytes: 51 }
    );
}

// Goal: nodes are joined again. Method: most of many keys die, in an order that empties no leaf at once.
#[test]
fn tree_shrinks_when_keys_leave() {
    let mut index = Index::default();
    for i in 0..5_000 {
        index.put(format!("{:05}", i * 7 % 5_000).as_bytes(), rev(2 + i, 0), 10);
    }
    let full = index.clone();
    for i in (0..5_000).filter(|i| i % 50 != 0) {
        index.delete(format!("{i:05}").as_bytes(), rev(6_000 + i, 0), 10);
    }
    compact(&mut index, 20_000);
    index.check();
    assert_eq!(index.len(), 100);
    assert!(index.leaf_count() <= 100 / LEAF_KEYS * 8 / 3 + 1, "{} leaves", index.leaf_count());
    assert_eq!(full.count(KeyRange::ALL, 5_001), 5_000);
    for i in (0..5_000).filter(|i| i % 50 == 0) {
        index.delete(format!("{i:05}").as_bytes(), rev(30_000 + i, 0), 10);
    }
    compact(&mut index, 40_000);
    assert!(index.is_empty() && index.leaf_count() == 1);
}

#[test]
fn ascending_keys_fill_their_leaves() {
    let mut index = Index::default();
    for i in 0..5_000 {
        index.put(format!("{i:05}").as_bytes(), rev(2 + i, 0), 10);
    }
    index.check();
    assert!(index.leaf_count() <= 5_000 / (LEAF_KEYS - 2), "{} leaves", index.leaf_count());
}

#[test]
#[should_panic(expected = "changes come in revision order")]
fn revision_going_back_panics() {
    let mut index = index_of(&[("a", 5)]);
    index.put(b"b", rev(4, 0), 10);
}
