//! The keys of one node in one buffer, so that copying a node is copying bytes.

#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    bytes: Vec<u8>,
    /// Where each key ends; it begins where the one before ends.
    ends: Vec<u32>,
}

impl Keys {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Sum of the key lengths.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    pub fn get(&self, i: usize) -> &[u8] {
        &self.bytes[self.start(i)..self.ends[i] as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i))
    }

    /// Position of `key`, or where it would go.
    pub fn search(&self, key: &[u8]) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let mid = (low + high) / 2;
            match self.get(mid).cmp(key) {
                std::cmp::Ordering::Less => low = mid + 1,
                std::cmp::Ordering::Greater => high = mid,
                std::cmp::Ordering::Equal => return Ok(mid),
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
        super::insert_tight(&mut self.ends, i, offset(start));
        for end in &mut self.ends[i..] {
            *end += offset(key.len());
        }
    }

    pub fn push(&mut self, key: &[u8]) {
        self.bytes.extend_from_slice(key);
        self.ends.push(offset(self.bytes.len()));
    }

    pub fn remove(&mut self, i: usize) {
        let (start, len) = (self.start(i), self.get(i).len());
        self.bytes.drain(start..start + len);
        self.ends.remove(i);
        for end in &mut self.ends[i..] {
            *end -= offset(len);
        }
    }

    pub fn append(&mut self, other: &Keys) {
        let base = offset(self.bytes.len());
        self.bytes.extend_from_slice(&other.bytes);
        // Checks the last and largest end, and with it all.
        offset(self.bytes.len());
        self.ends.extend(other.ends.iter().map(|end| base + end));
    }

    /// Takes the keys from `i` on away.
    pub fn split_off(&mut self, i: usize) -> Keys {
        let start = self.start(i);
        let bytes = self.bytes.split_off(start);
        let ends = self.ends.split_off(i).into_iter().map(|end| end - offset(start)).collect();
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
        Keys { bytes, ends }
    }

    fn start(&self, i: usize) -> usize {
        if i == 0 { 0 } else { self.ends[i - 1] as usize }
    }
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
        keys.append(&tail);
        keys.push(b"zzz");
        assert!(keys.iter().eq(["", "c", "ca", "zz", "zzz"].map(str::as_bytes)));
        assert_eq!(keys.byte_len(), 8);
    }
}
