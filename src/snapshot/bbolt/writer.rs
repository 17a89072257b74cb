//! Makes a file from rows in order, page after page, for a receiver that cannot seek.
//!
//! Trees grow from below: a full leaf goes out, and its first key and page number join the open page of the level
//! above, which goes out when it is full, and so on. So pages of all levels are mixed in the file, which readers
//! do not mind, and what is kept in memory is one open page per level (five for a billion rows), a chunk,
//! and the largest row, however many rows there are.
//!
//! The first two pages name the root and the number of pages, which are known last. Therefore a file is made twice
//! from the same rows: [`Writer::measure`] only counts, then [`Writer::stream`] writes. The alternatives are worse:
//! a temporary file costs the disk a write and a read of everything, and a length guessed from above would send up to
//! twice as much.

use bytes::{BufMut, Bytes, BytesMut};

use super::format::{
    BRANCH, BUCKET_ELEMENT, BUCKET_HEADER, COUNT_MAX, ELEMENT, KEY_MAX, LEAF, Layout, PAGE_HEADER, PAGE_SIZE,
    PageHeader, VALUE_MAX,
};
use crate::snapshot::{Error, checksum::Checksum};

/// Bytes handed to the receiver at once; the last chunk may be shorter.
pub const CHUNK: usize = 32 << 10;

/// Where chunks go.
pub type Sink<'a> = &'a mut dyn FnMut(Bytes) -> Result<(), Error>;

/// Buckets and rows are to be given in ascending order.
pub struct Writer<'a> {
    out: Out<'a>,
    root: Tree,
    checksum: Checksum,
    bucket: Option<Bucket>,
}

struct Bucket {
    name: Vec<u8>,
    rows: Tree,
}

impl<'a> Writer<'a> {
    /// Counts pages and writes none.
    pub fn measure() -> Self {
        Self::new(None)
    }

    /// Writes the file that was measured.
    pub fn stream(layout: &Layout, sink: Sink<'a>) -> Self {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        chunk.extend_from_slice(&layout.metas());
        Self::new(Some(Stream { sink, chunk }))
    }

    fn new(stream: Option<Stream<'a>>) -> Self {
        Self { out: Out { stream, next: 2 }, root: Tree::new(), checksum: Checksum::default(), bucket: None }
    }

    /// Begins the next bucket.
    pub fn bucket(&mut self, name: &[u8]) -> Result<(), Error> {
        self.end_bucket()?;
        self.checksum.bucket(name);
        self.bucket = Some(Bucket { name: name.to_vec(), rows: Tree::new() });
        Ok(())
    }

    /// Adds a row to the bucket begun last.
    pub fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let bucket = self.bucket.as_mut().expect("a row follows the name of its bucket");
        self.checksum.row(key, value);
        bucket.rows.row(&mut self.out, 0, key, value)
    }

    /// Writes what is left.
    pub fn finish(mut self) -> Result<Layout, Error> {
        self.end_bucket()?;
        let root = self.root.finish(&mut self.out)?;
        self.out.flush()?;
        Ok(Layout { root, pages: self.out.next, checksum: self.checksum })
    }

    fn end_bucket(&mut self) -> Result<(), Error> {
        let Some(Bucket { name, rows }) = self.bucket.take() else { return Ok(()) };
        let mut header = Vec::with_capacity(BUCKET_HEADER);
        match rows.only_page().filter(|page| page.bytes() <= PAGE_SIZE / 4) {
            // The rows lie behind the header, as a page without a number.
            Some(page) => {
                header.put_bytes(0, BUCKET_HEADER);
                page.put(0, 0, &mut header);
            }
            None => {
                header.put_u64_le(rows.finish(&mut self.out)?);
                header.put_u64_le(0); // sequence
            }
        }
        self.root.row(&mut self.out, BUCKET_ELEMENT, &name, &header)
    }
}

/// The pages written so far.
struct Out<'a> {
    stream: Option<Stream<'a>>,
    /// Number of the next page.
    next: u64,
}

struct Stream<'a> {
    sink: Sink<'a>,
    chunk: BytesMut,
}

impl Out<'_> {
    /// Writes `page` and empties it; its number.
    fn page(&mut self, page: &mut Page) -> Result<u64, Error> {
        let id = self.next;
        let pages = page.bytes().div_ceil(PAGE_SIZE);
        self.next += pages as u64;
        if let Some(Stream { sink, chunk }) = &mut self.stream {
            let overflow = u32::try_from(pages - 1).expect("four rows of 2 GiB are fewer pages");
            let start = chunk.len();
            page.put(id, overflow, chunk);
            chunk.resize(start + pages * PAGE_SIZE, 0);
            while chunk.len() >= CHUNK {
                sink(chunk.split_to(CHUNK).freeze())?;
            }
        }
        page.clear();
        Ok(id)
    }

    fn flush(&mut self) -> Result<(), Error> {
        match &mut self.stream {
            Some(Stream { sink, chunk }) if !chunk.is_empty() => sink(chunk.split().freeze()),
            _ => Ok(()),
        }
    }
}

/// A tree being built: the open page of each level, the leaf first. Every page but the leaf of an empty tree holds
/// something.
struct Tree {
    levels: Vec<Page>,
    last_key: Vec<u8>,
}

impl Tree {
    fn new() -> Self {
        Self { levels: vec![Page::new(LEAF)], last_key: Vec::new() }
    }

    /// The only page, if none has been written.
    fn only_page(&self) -> Option<&Page> {
        match &self.levels[..] {
            [leaf] => Some(leaf),
            _ => None,
        }
    }

    fn row(&mut self, out: &mut Out<'_>, flags: u32, key: &[u8], value: &[u8]) -> Result<(), Error> {
        if key.is_empty() || key.len() > KEY_MAX || value.len() > VALUE_MAX {
            let text = format!("a row with a key of {} and a value of {} bytes", key.len(), value.len());
            return Err(Error::Unfit(text));
        }
        assert!(self.last_key.as_slice() < key, "rows come in the order of their keys");
        self.last_key.clear();
        self.last_key.extend_from_slice(key);

        let leaf = &self.levels[0];
        let is_full = leaf.bytes() + ELEMENT + key.len() + value.len() > PAGE_SIZE || leaf.count() == COUNT_MAX;
        if is_full && leaf.count() > 0 {
            self.close(0, out)?;
        }
        self.levels[0].add_row(flags, key, value);
        Ok(())
    }

    /// Writes the open page of `level` and tells the level above.
    fn close(&mut self, level: usize, out: &mut Out<'_>) -> Result<(), Error> {
        let first_key = self.levels[level].first_key().to_vec();
        let id = out.page(&mut self.levels[level])?;
        let above = level + 1;
        if self.levels.len() == above {
            self.levels.push(Page::new(BRANCH));
        }
        let page = &mut self.levels[above];
        if page.count() >= 4 && (page.bytes() + ELEMENT + first_key.len() > PAGE_SIZE || page.count() == COUNT_MAX) {
            // The last child stays, so that the next page does not begin with one that may remain alone.
            let (key, child) = page.pop_child();
            self.close(above, out)?;
            self.levels[above].add_child(&key, child);
        }
        self.levels[above].add_child(&first_key, id);
        Ok(())
    }

    /// Writes the open pages; the number of the root.
    fn finish(mut self, out: &mut Out<'_>) -> Result<u64, Error> {
        let mut level = 0;
        while level + 1 < self.levels.len() {
            self.close(level, out)?;
            level += 1;
        }
        out.page(&mut self.levels[level])
    }
}

/// An open leaf or branch.
struct Page {
    kind: u16,
    elements: Vec<Element>,
    /// Keys, and in leaves values, in their order.
    data: Vec<u8>,
}

struct Element {
    /// Of a leaf's element.
    flags: u32,
    key: u32,
    /// 0 in branches.
    value: u32,
    /// 0 in leaves.
    child: u64,
}

impl Page {
    fn new(kind: u16) -> Self {
        Self { kind, elements: Vec::new(), data: Vec::new() }
    }

    fn count(&self) -> usize {
        self.elements.len()
    }

    /// Bytes of the page, unpadded.
    fn bytes(&self) -> usize {
        PAGE_HEADER + ELEMENT * self.elements.len() + self.data.len()
    }

    fn add_row(&mut self, flags: u32, key: &[u8], value: &[u8]) {
        self.elements.push(Element { flags, key: key.len() as u32, value: value.len() as u32, child: 0 });
        self.data.extend_from_slice(key);
        self.data.extend_from_slice(value);
    }

    fn add_child(&mut self, key: &[u8], child: u64) {
        self.elements.push(Element { flags: 0, key: key.len() as u32, value: 0, child });
        self.data.extend_from_slice(key);
    }

    fn pop_child(&mut self) -> (Vec<u8>, u64) {
        let last = self.elements.pop().expect("only a page that is full loses its last child");
        (self.data.split_off(self.data.len() - last.key as usize), last.child)
    }

    fn first_key(&self) -> &[u8] {
        &self.data[..self.elements[0].key as usize]
    }

    fn clear(&mut self) {
        self.elements.clear();
        self.data.clear();
        // The buffer of a large value is not kept.
        self.data.shrink_to(2 * PAGE_SIZE);
    }

    fn put(&self, id: u64, overflow: u32, out: &mut impl BufMut) {
        PageHeader { id, flags: self.kind, count: self.count() as u16, overflow }.put(out);
        let mut data = 0;
        for (i, element) in self.elements.iter().enumerate() {
            // Counted from the element itself. Wide enough: a leaf beyond one page holds one row, a branch four keys.
            let pos = (ELEMENT * (self.count() - i) + data) as u32;
            if self.kind == LEAF {
                out.put_u32_le(element.flags);
                out.put_u32_le(pos);
                out.put_u32_le(element.key);
                out.put_u32_le(element.value);
            } else {
                out.put_u32_le(pos);
                out.put_u32_le(element.key);
                out.put_u64_le(element.child);
            }
            data += (element.key + element.value) as usize;
        }
        out.put_slice(&self.data);
    }
}
