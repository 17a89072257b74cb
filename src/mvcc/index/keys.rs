//! The keys of one node in one buffer, so that copying a node is copying bytes.
//!
//! Beside where it ends, each key has its head at hand: the four bytes after the prefix that all keys of the node share.
//! A search bisects the heads, which lie side by side, and compares whole keys only among equal heads: one, mostly.

use std::cmp::Ordering;

#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    bytes: Vec<u8>,
    slots: Vec<Slot>,
    /// Length of the prefix that all keys share; with one key, its length.
    shared: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    head: u32,
    /// Where the key ends; it begins where the one before ends.
    end: u32,
}

impl Keys {
    /// From keys in ascending order.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut new = Self::default();
        for key in keys {
            new.bytes.extend_from_slice(key);
            new.slots.push(Slot { head: 0, end: offset(new.bytes.len()) });
        }
        new.slots.shrink_to_fit();
        new.bytes.shrink_to_fit();
        new.find_heads();
        new
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Sum of the key lengths.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    pub fn get(&self, i: usize) -> &[u8] {
        &self.bytes[self.start(i)..self.slots[i].end as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i))
    }

    /// Position of `key`, or where it would go.
    pub fn search(&self, key: &[u8]) -> Result<usize, usize> {
        let prefix = &self.bytes[..self.shared];
        match key[..key.len().min(self.shared)].cmp(prefix) {
            Ordering::Less => return Err(0),
            Ordering::Greater => return Err(self.len()),
            Ordering::Equal => {}
        }
        let head = head(&key[self.shared..]);
        let mut low = self.slots.partition_point(|slot| slot.head < head);
        while low < self.len() && self.slots[low].head == head {
            match self.get(low).cmp(key) {
                Ordering::Less => low += 1,
                Ordering::Greater => break,
                Ordering::Equal => return Ok(low),
            }
        }
        Err(low)
    }

    /// Number of keys below `key`.
    pub fn below(&self, key: &[u8]) -> usize {
        self.search(key).unwrap_or_else(|i| i)
    }

    /// Number of keys at or below `key`.
    pub fn at_or_below(&self, key: &[u8]) -> usize {
        self.search(key).map_or_else(|i| i, |i| i + 1)
    }

    pub fn insert(&mut self, i: usize, key: &[u8]) {
        let (start, old_len) = (self.start(i), self.bytes.len());
        if self.bytes.capacity() - old_len < key.len() {
            self.bytes.reserve_exact(key.len() * super::SPARE);
        }
        self.bytes.resize(old_len + key.len(), 0);
        self.bytes.copy_within(start..old_len, start + key.len());
        self.bytes[start..start + key.len()].copy_from_slice(key);
        super::insert_tight(&mut self.slots, i, Slot { head: 0, end: offset(start) });
        for slot in &mut self.slots[i..] {
            slot.end += offset(key.len());
        }
        // Only a new first or last key can share less with the others.
        if i == 0 || i == self.len() - 1 {
            self.find_heads();
        } else {
            self.slots[i].head = head(&key[self.shared..]);
        }
    }

    pub fn remove(&mut self, i: usize) {
        let (start, len) = (self.start(i), self.get(i).len());
        self.bytes.drain(start..start + len);
        self.slots.remove(i);
        for slot in &mut self.slots[i..] {
            slot.end -= offset(len);
        }
        self.find_heads();
    }

    /// Takes the keys from `i` on away.
    pub fn split_off(&mut self, i: usize) -> Keys {
        let right = Self::new((i..self.len()).map(|i| self.get(i)));
        self.bytes.truncate(self.start(i));
        self.slots.truncate(i);
        self.bytes.shrink_to_fit();
        self.slots.shrink_to_fit();
        self.find_heads();
        right
    }

    fn find_heads(&mut self) {
        let Some(last) = self.len().checked_sub(1) else {
            self.shared = 0;
            return;
        };
        self.shared = common_prefix(self.get(0), self.get(last));
        let mut start = 0;
        for slot in &mut self.slots {
            slot.head = head(&self.bytes[start + self.shared..slot.end as usize]);
            start = slot.end as usize;
        }
    }

    fn start(&self, i: usize) -> usize {
        if i == 0 { 0 } else { self.slots[i - 1].end as usize }
    }
}

pub(super) fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The first four bytes as a number that orders like them; a shorter string is padded with zeros, so equal heads say
/// nothing.
fn head(key: &[u8]) -> u32 {
    let mut head = [0; 4];
    let len = key.len().min(4);
    head[..len].copy_from_slice(&key[..len]);
    u32::from_be_bytes(head)
}

fn offset(position: usize) -> u32 {
    u32::try_from(position).expect("the keys of a node are some KiB, or one request's key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_packed_in_order() {
        let mut keys = Keys::default();
        for key in ["m", "c", "", "zz", "ca"] {
            let i = keys.search(key.as_bytes()).unwrap_err();
            keys.insert(i, key.as_bytes());
        }
        assert!(keys.iter().eq(["", "c", "ca", "m", "zz"].map(str::as_bytes)));
        assert_eq!((keys.below(b"ca"), keys.at_or_below(b"ca"), keys.below(b"d")), (2, 3, 3));
        let mut tail = keys.split_off(2);
        assert!(tail.iter().eq(["ca", "m", "zz"].map(str::as_bytes)));
        tail.remove(1);
        let keys = Keys::new(keys.iter().chain(tail.iter()).chain([&b"zzz"[..]]));
        assert!(keys.iter().eq(["", "c", "ca", "zz", "zzz"].map(str::as_bytes)));
        assert_eq!(keys.byte_len(), 8);
    }

    // Goal: heads and prefix never mislead. Method: all short strings of few letters, zero bytes among them, in and out.
    #[test]
    fn search_agrees_with_a_sorted_list() {
        let letters = [0u8, 1, 97, 255];
        let mut strings: Vec<Vec<u8>> = vec![vec![]];
        for i in 0.. {
            if strings[i].len() == 3 {
                break;
            }
            strings.extend(letters.map(|letter| [&strings[i][..], &[letter]].concat()));
        }
        for prefix in ["", "p", "prefix"] {
            let asked: Vec<Vec<u8>> = strings.iter().map(|s| [prefix.as_bytes(), s].concat()).collect();
            let (mut keys, mut list) = (Keys::default(), Vec::new());
            for step in 0..400 {
                let key = &asked[step * 37 % asked.len()];
                match list.binary_search(key) {
                    Ok(i) => {
                        keys.remove(i);
                        list.remove(i);
                    }
                    Err(i) => {
                        keys.insert(i, key);
                        list.insert(i, key.clone());
                    }
                }
                assert!(keys.iter().eq(list.iter().map(|key| &key[..])));
                for key in asked.iter().chain(&strings) {
                    assert_eq!(keys.search(key), list.binary_search(key), "{key:?} in {list:?}");
                }
            }
        }
    }
}
