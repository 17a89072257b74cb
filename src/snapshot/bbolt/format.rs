//! Layouts of pages, of the two meta pages and of bucket headers. All numbers are little-endian.

use crate::snapshot::checksum::Checksum;
use bytes::BufMut;

/// Of the files we write. Those we read say theirs.
pub const PAGE_SIZE: usize = 4096;
/// Longest key of a row; no key is empty.
pub const KEY_MAX: usize = 32_768;
/// Longest value of a row.
pub const VALUE_MAX: usize = (1 << 31) - 2;
/// Elements of one page.
pub const COUNT_MAX: usize = 65_534;

pub const BRANCH: u16 = 0x01;
pub const LEAF: u16 = 0x02;
pub const META: u16 = 0x04;
pub const FREELIST: u16 = 0x10;

/// Leaf element: the value is a bucket header.
pub const BUCKET_ELEMENT: u32 = 1;

pub const PAGE_HEADER: usize = 16;
/// Of leaves and branches alike.
pub const ELEMENT: usize = 16;
pub const BUCKET_HEADER: usize = 16;
/// A meta page without its page header.
pub const META_BODY: usize = 64;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
/// The free pages are those no tree reaches.
pub const NO_FREELIST: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    pub id: u64,
    pub flags: u16,
    pub count: u16,
    pub overflow: u32,
}

impl PageHeader {
    pub fn put(self, out: &mut impl BufMut) {
        out.put_u64_le(self.id);
        out.put_u16_le(self.flags);
        out.put_u16_le(self.count);
        out.put_u32_le(self.overflow);
    }

    /// `None` if `bytes` is shorter than a header.
    pub fn get(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            id: u64_at(bytes, 0)?,
            flags: u16::from_le_bytes(bytes.get(8..10)?.try_into().ok()?),
            count: u16::from_le_bytes(bytes.get(10..12)?.try_into().ok()?),
            overflow: u32_at(bytes, 12)?,
        })
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub page_size: u32,
    pub root: u64,
    pub freelist: u64,
    /// Number of pages in use, the metas included.
    pub pages: u64,
    pub txid: u64,
}

impl Meta {
    pub fn put(self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u32_le(MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(self.page_size);
        out.put_u32_le(0); // flags
        out.put_u64_le(self.root);
        out.put_u64_le(0); // sequence of the root bucket
        out.put_u64_le(self.freelist);
        out.put_u64_le(self.pages);
        out.put_u64_le(self.txid);
        let checksum = fnv1a(&out[start..]);
        out.put_u64_le(checksum);
    }

    /// What follows the page header of a meta page; `None` if it is no valid meta.
    pub fn get(body: &[u8]) -> Option<Self> {
        let body = body.get(..META_BODY)?;
        let is_valid =
            u32_at(body, 0)? == MAGIC && u32_at(body, 4)? == VERSION && u64_at(body, 56)? == fnv1a(&body[..56]);
        is_valid.then_some(Self {
            page_size: u32_at(body, 8)?,
            root: u64_at(body, 16)?,
            freelist: u64_at(body, 32)?,
            pages: u64_at(body, 40)?,
            txid: u64_at(body, 48)?,
        })
    }
}

/// FNV-1a, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// All that the pages at the front of a file say about those behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub root: u64,
    /// Of the file, the two metas included.
    pub pages: u64,
    /// Of what is in it.
    pub checksum: Checksum,
}

impl Layout {
    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }

    /// Pages 0 and 1: the same content, transactions 0 and 1.
    pub fn metas(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(2 * PAGE_SIZE);
        for txid in 0..2 {
            PageHeader { id: txid, flags: META, count: 0, overflow: 0 }.put(&mut out);
            let page_size = PAGE_SIZE as u32;
            Meta { page_size, root: self.root, freelist: NO_FREELIST, pages: self.pages, txid }.put(&mut out);
            out.resize(PAGE_SIZE * (txid as usize + 1), 0);
        }
        out
    }
}
