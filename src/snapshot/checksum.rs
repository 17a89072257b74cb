//! What a member says of the rows of a database it sends to another: their CRC-32C. The file has none below its heads, and
//! rafthttp trusts TCP; with it a bit that flipped on the way is noticed before the database is taken on.
//!
//! It goes along in the `context` of the snapshot message, which nobody reads there: etcd ignores it, and what etcd sends
//! is taken without.

const NAME: &str = "rows-crc32c=";

/// Over the buckets and rows of a file in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum(u32);

impl Checksum {
    pub fn bucket(&mut self, name: &[u8]) {
        self.add(name);
    }

    pub fn row(&mut self, key: &[u8], value: &[u8]) {
        self.add(key);
        self.add(value);
    }

    /// With its length, so that no two lists of rows are alike.
    fn add(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        self.0 = crc32c::crc32c_append(crc32c::crc32c_append(self.0, &length), bytes);
    }

    /// As it goes along.
    pub fn to_context(self) -> String {
        format!("{NAME}{:08x}", self.0)
    }

    /// What came along, if it did.
    pub fn from_context(context: &[u8]) -> Option<Self> {
        let digits = std::str::from_utf8(context).ok()?.strip_prefix(NAME)?;
        u32::from_str_radix(digits, 16).ok().map(Self)
    }
}
