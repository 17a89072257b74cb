//! Positions in the store's history, row keys, and key ranges as clients write them.

/// One change: `main` counts the writes of the store, `sub` the changes within one write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    pub main: i64,
    pub sub: i64,
}

/// Length of a row key without the tombstone mark.
pub const ROW_KEY_LEN: usize = 17;
/// Last byte of a tombstone's row key.
pub const TOMBSTONE: u8 = b't';

impl Revision {
    pub fn new(main: i64, sub: i64) -> Self {
        Self { main, sub }
    }

    /// The key of this change's row: main (8 bytes big-endian), `_`, sub (8 bytes big-endian), and `t` for a tombstone.
    pub fn to_row_key(self, tombstone: bool) -> Vec<u8> {
        let mut key = Vec::with_capacity(ROW_KEY_LEN + 1);
        key.extend_from_slice(&self.main.to_be_bytes());
        key.push(b'_');
        key.extend_from_slice(&self.sub.to_be_bytes());
        if tombstone {
            key.push(TOMBSTONE);
        }
        key
    }

    /// The revision and whether the row is a tombstone; `None` if `key` is no row key.
    pub fn from_row_key(key: &[u8]) -> Option<(Self, bool)> {
        let tombstone = match key.len() {
            ROW_KEY_LEN => false,
            n if n == ROW_KEY_LEN + 1 && key[ROW_KEY_LEN] == TOMBSTONE => true,
            _ => return None,
        };
        if key[8] != b'_' {
            return None;
        }
        let main = i64::from_be_bytes(key[..8].try_into().ok()?);
        let sub = i64::from_be_bytes(key[9..ROW_KEY_LEN].try_into().ok()?);
        Some((Self { main, sub }, tombstone))
    }
}

/// A range in the API's own addressing: `end` empty: the one key; `end` = `"\0"`: all keys from `key` on;
/// else `[key, end)`, which is empty when `end` <= `key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRange<'a> {
    pub key: &'a [u8],
    pub end: &'a [u8],
}

impl<'a> KeyRange<'a> {
    pub fn new(key: &'a [u8], end: &'a [u8]) -> Self {
        Self { key, end }
    }

    pub const ALL: KeyRange<'static> = KeyRange { key: &[0], end: &[0] };

    pub fn is_single(&self) -> bool {
        self.end.is_empty()
    }

    pub fn is_from_key(&self) -> bool {
        self.end == [0]
    }

    /// True if no key can be in the range.
    pub fn is_empty(&self) -> bool {
        !self.is_single() && !self.is_from_key() && self.end <= self.key
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        if self.is_single() { key == self.key } else { key >= self.key && (self.is_from_key() || key < self.end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_keys_sort_as_revisions_and_read_back() {
        let rev = Revision::new(5, 2);
        assert_eq!(Revision::from_row_key(&rev.to_row_key(false)), Some((rev, false)));
        assert_eq!(Revision::from_row_key(&rev.to_row_key(true)), Some((rev, true)));
        assert!(rev.to_row_key(true) > rev.to_row_key(false));
        assert!(Revision::new(5, 3).to_row_key(false) > rev.to_row_key(true));
        assert_eq!(Revision::from_row_key(b"short"), None);
    }

    #[test]
    fn ranges_follow_the_api() {
        assert!(KeyRange::new(b"a", b"").contains(b"a"));
        assert!(!KeyRange::new(b"a", b"").contains(b"aa"));
        assert!(KeyRange::new(b"b", &[0]).contains(b"z"));
        assert!(!KeyRange::new(b"b", b"d").contains(b"d"));
        assert!(KeyRange::new(b"d", b"b").is_empty());
        assert!(KeyRange::ALL.contains(&[0]));
    }
}
