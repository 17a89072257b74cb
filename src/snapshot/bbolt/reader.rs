//! Checks a file and reads its rows in order. It may come from anywhere and be damaged in any way: every number in it
//! is checked before it is used, and what is wrong is an error that names the page.
//!
//! Reads page by page by position; in memory are one bit per page, the pages from a root to a leaf, and with them the
//! largest row. What the format cannot show is not found: keys and values have no checksum of their own. A backup has
//! one over everything (`backup.rs`).

use std::{fs::File, io, os::unix::fs::FileExt};

use bytes::Bytes;

use super::format::{
    BRANCH, BUCKET_ELEMENT, BUCKET_HEADER, ELEMENT, FREELIST, KEY_MAX, LEAF, META, META_BODY, Meta, NO_FREELIST,
    PAGE_HEADER, PageHeader, VALUE_MAX, u32_at, u64_at,
};
use crate::snapshot::Error;

const PAGE_SIZE_MIN: u64 = 1 << 10;
const PAGE_SIZE_MAX: u64 = 16 << 20;
/// Pages from the root to a leaf: with two children each that is more than any file holds.
const DEPTH_MAX: usize = 64;
/// One page with all that overflows from it: a few of the largest values. Bounds what a damaged number makes us read.
const PAGE_BYTES_MAX: u64 = 1 << 30;

/// Told of all buckets and rows in order, each row after its bucket. An error ends the reading.
pub trait Visitor {
    fn bucket(&mut self, name: &[u8]) -> Result<(), Error>;

    /// Slices of a page image: a copy is needed to keep one for long.
    fn row(&mut self, key: Bytes, value: Bytes) -> Result<(), Error>;
}

/// Where a file's bytes are.
pub trait Source: Send {
    fn size(&self) -> io::Result<u64>;

    /// Fills the buffer; `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

impl Source for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, at)
    }
}

impl Source for Bytes {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(buffer.len() as u64).filter(|end| *end <= self.len() as u64);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(&self[at as usize..end as usize]);
        Ok(())
    }
}

pub struct Reader {
    file: Box<dyn Source>,
    meta: Meta,
    page_size: u64,
    /// Pages that belong to something.
    reached: Bits,
    /// Pages in the stored list of free ones.
    free: Option<Bits>,
}

impl Reader {
    /// Finds the newest valid meta page.
    pub fn open(file: Box<dyn Source>) -> Result<Self, Error> {
        let len = file.size()?;
        let first = meta_at(&*file, 0, 0)?;
        let second = match first {
            Some(meta) => meta_at(&*file, u64::from(meta.page_size), 1)?,
            None => {
                let mut sizes = (0..15).map(|i| PAGE_SIZE_MIN << i);
                sizes.find_map(|at| meta_at(&*file, at, 1).transpose()).transpose()?
            }
        };
        let second = second.filter(|second| first.is_none_or(|first| first.page_size == second.page_size));
        let newest = first.into_iter().chain(second).max_by_key(|meta| meta.txid);
        let meta = newest.ok_or_else(|| Error::Damaged("neither of its first two pages is valid".to_owned()))?;

        let page_size = u64::from(meta.page_size);
        if meta.pages.checked_mul(page_size).is_none_or(|bytes| bytes > len) {
            let text = format!("it should have {} pages of {page_size} bytes, but has {len} bytes", meta.pages);
            return Err(Error::Damaged(text));
        }
        let mut reader = Self { file, meta, page_size, reached: Bits::new(meta.pages), free: None };
        for page in 0..2 {
            reader.reached.set(page);
        }
        if meta.freelist != NO_FREELIST {
            reader.read_freelist()?;
        }
        Ok(reader)
    }

    /// Of the file, without what may follow the last page in use.
    pub fn bytes(&self) -> u64 {
        self.meta.pages * self.page_size
    }

    /// Checks everything and visits the rows meanwhile: they count only if this returns without an error.
    pub fn read(mut self, visitor: &mut dyn Visitor) -> Result<(), Error> {
        self.walk(self.meta.root, &mut |reader, page, element| {
            if element.flags != BUCKET_ELEMENT {
                return Err(page.damaged("a row outside of all buckets"));
            }
            visitor.bucket(page.key(element))?;
            reader.bucket(page, element, visitor)
        })?;
        match &self.free {
            // Without a list the free pages are those not reached.
            None => Ok(()),
            Some(free) => match (0..self.meta.pages).find(|page| !self.reached.has(*page) && !free.has(*page)) {
                Some(page) => Err(Error::Damaged(format!("page {page} is neither in use nor free"))),
                None => Ok(()),
            },
        }
    }

    fn bucket(&mut self, page: &Page, element: &Element, visitor: &mut dyn Visitor) -> Result<(), Error> {
        let mut rows = |_: &mut Self, page: &Page, element: &Element| {
            if element.flags == BUCKET_ELEMENT {
                return Err(page.damaged("a bucket within a bucket"));
            }
            visitor.row(page.image.slice(element.key.clone()), page.image.slice(element.value.clone()))
        };
        let header = page.image.slice(element.value.clone());
        match u64_at(&header, 0) {
            Some(0) if header.len() >= BUCKET_HEADER => {
                let image = header.slice(BUCKET_HEADER..);
                let inline = Page::parse(page.id, image, self.meta.pages)?;
                match PageHeader::get(&inline.image) {
                    Some(PageHeader { id: 0, flags: LEAF, overflow: 0, .. }) => {}
                    _ => return Err(page.damaged("a bucket's rows are no leaf")),
                }
                inline.elements.iter().try_for_each(|element| rows(self, &inline, element))
            }
            Some(root) if header.len() >= BUCKET_HEADER => self.walk(root, &mut rows),
            _ => Err(page.damaged("a bucket's header is cut")),
        }
    }

    /// Visits the elements of all leaves below `root` in order.
    fn walk(&mut self, root: u64, visit: &mut Visit<'_>) -> Result<(), Error> {
        /// A page on the way down, and what is left of it.
        struct Step {
            page: Page,
            next: usize,
            /// All keys below are smaller.
            end: Option<Bytes>,
        }
        let page = self.load(root)?;
        let mut path = vec![Step { page, next: 0, end: None }];
        while let Some(step) = path.last_mut() {
            if step.page.is_leaf {
                step.page.elements.iter().try_for_each(|element| visit(self, &step.page, element))?;
                path.pop();
                continue;
            }
            let Some(element) = step.page.elements.get(step.next) else {
                path.pop();
                continue;
            };
            step.next += 1;
            let following = step.page.elements.get(step.next);
            let end = following.map(|next| step.page.image.slice(next.key.clone())).or_else(|| step.end.clone());
            let child = self.load(element.child)?;
            let from = step.page.key(element);
            let is_within = match (child.elements.first(), child.elements.last()) {
                (Some(first), Some(last)) => {
                    child.key(first) >= from && end.as_ref().is_none_or(|end| child.key(last) < &end[..])
                }
                _ => child.is_leaf,
            };
            if !is_within {
                return Err(child.damaged("keys outside of the bounds the page above gives"));
            }
            if path.len() == DEPTH_MAX {
                return Err(child.damaged("the tree is too deep"));
            }
            path.push(Step { page: child, next: 0, end });
        }
        Ok(())
    }

    /// Reads a page of a tree with what overflows from it.
    fn load(&mut self, id: u64) -> Result<Page, Error> {
        let (header, run) = self.header(id)?;
        if header.flags != BRANCH && header.flags != LEAF {
            return Err(damaged(id, &format!("a page of kind {:#x} in a tree", header.flags)));
        }
        self.claim(id, run)?;
        let len = run * self.page_size;
        let image = if len <= PAGE_BYTES_MAX { self.bytes_at(id, len)? } else { Bytes::new() };
        Page::parse(id, image, self.meta.pages)
    }

    /// The header of page `id`, and how many pages it spans.
    fn header(&self, id: u64) -> Result<(PageHeader, u64), Error> {
        if id < 2 || id >= self.meta.pages {
            return Err(damaged(id, "the file has no such page"));
        }
        let mut bytes = [0; PAGE_HEADER];
        self.file.read_exact_at(&mut bytes, id * self.page_size)?;
        let header = PageHeader::get(&bytes).expect("it is as long");
        let run = u64::from(header.overflow) + 1;
        if header.id != id {
            return Err(damaged(id, &format!("it calls itself page {}", header.id)));
        }
        if run > self.meta.pages - id {
            return Err(damaged(id, "it goes beyond the end of the file"));
        }
        Ok((header, run))
    }

    fn claim(&mut self, id: u64, run: u64) -> Result<(), Error> {
        for page in id..id + run {
            if self.reached.has(page) {
                return Err(damaged(page, "it is in use twice"));
            }
            if self.free.as_ref().is_some_and(|free| free.has(page)) {
                return Err(damaged(page, "it is in use and free"));
            }
            self.reached.set(page);
        }
        Ok(())
    }

    fn bytes_at(&self, id: u64, len: u64) -> Result<Bytes, Error> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| damaged(id, "it is too large"))?];
        self.file.read_exact_at(&mut bytes, id * self.page_size)?;
        Ok(bytes.into())
    }

    fn read_freelist(&mut self) -> Result<(), Error> {
        let id = self.meta.freelist;
        let (header, run) = self.header(id)?;
        if header.flags != FREELIST {
            return Err(damaged(id, "it should be the list of free pages"));
        }
        self.claim(id, run)?;
        let room = (run * self.page_size - PAGE_HEADER as u64) / 8;
        let start = id * self.page_size + PAGE_HEADER as u64;
        let number = |i: u64| -> Result<u64, Error> {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, start + i * 8)?;
            Ok(u64::from_le_bytes(bytes))
        };
        // A count that does not fit its field is the first number.
        let (first, count) = match header.count {
            u16::MAX => (1, number(0)?),
            count => (0, u64::from(count)),
        };
        if count > room - first {
            return Err(damaged(id, "the list of free pages is longer than its pages"));
        }
        let mut free = Bits::new(self.meta.pages);
        for i in first..first + count {
            let page = number(i)?;
            if page >= self.meta.pages || self.reached.has(page) || free.has(page) {
                return Err(damaged(id, &format!("page {page} cannot be free")));
            }
            free.set(page);
        }
        self.free = Some(free);
        Ok(())
    }
}

type Visit<'a> = dyn FnMut(&mut Reader, &Page, &Element) -> Result<(), Error> + 'a;

fn damaged(page: u64, what: &str) -> Error {
    Error::Damaged(format!("page {page}: {what}"))
}

/// The valid meta page `number` at this place, if it is one.
fn meta_at(file: &dyn Source, at: u64, number: u64) -> Result<Option<Meta>, Error> {
    let mut bytes = [0; PAGE_HEADER + META_BODY];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let is_meta = PageHeader::get(&bytes).is_some_and(|header| header.id == number && header.flags == META);
    let meta = Meta::get(&bytes[PAGE_HEADER..]).filter(|meta| {
        let page_size = u64::from(meta.page_size);
        let has_size = page_size.is_power_of_two() && (PAGE_SIZE_MIN..=PAGE_SIZE_MAX).contains(&page_size);
        is_meta && has_size && (number == 0 || at == page_size)
    });
    Ok(meta)
}

/// A checked leaf or branch.
struct Page {
    id: u64,
    image: Bytes,
    is_leaf: bool,
    elements: Vec<Element>,
}

struct Element {
    key: std::ops::Range<usize>,
    /// Empty in branches.
    value: std::ops::Range<usize>,
    /// Of a leaf's element.
    flags: u32,
    /// 0 in leaves.
    child: u64,
}

impl Page {
    /// Checks that the elements lie back to back, then keys and values in their order, all within the image.
    fn parse(id: u64, image: Bytes, pages: u64) -> Result<Self, Error> {
        let header = PageHeader::get(&image).ok_or_else(|| damaged(id, "it is cut or too large"))?;
        let is_leaf = header.flags == LEAF;
        let count = usize::from(header.count);
        let mut data = PAGE_HEADER + ELEMENT * count;
        if count == 0 && !is_leaf {
            return Err(damaged(id, "a branch without children"));
        }
        if data > image.len() {
            return Err(damaged(id, "more elements than it can hold"));
        }
        let mut elements = Vec::with_capacity(count);
        let mut before: &[u8] = &[];
        for i in 0..count {
            let at = PAGE_HEADER + ELEMENT * i;
            let number = |offset| u32_at(&image, at + offset).expect("elements are within the image");
            let (flags, pos, key, value, child) = if is_leaf {
                (number(0), number(4), number(8) as usize, number(12) as usize, 0)
            } else {
                let child = u64_at(&image, at + 8).expect("elements are within the image");
                (0, number(0), number(4) as usize, 0, child)
            };
            if flags > BUCKET_ELEMENT || key == 0 || key > KEY_MAX || value > VALUE_MAX {
                return Err(damaged(id, &format!("element {i} has impossible numbers")));
            }
            let end = data + key + value;
            if at + pos as usize != data || end > image.len() {
                return Err(damaged(id, &format!("element {i} is not where it should be")));
            }
            if before >= &image[data..data + key] {
                return Err(damaged(id, &format!("the key of element {i} is out of order")));
            }
            if !is_leaf && !(2..pages).contains(&child) {
                return Err(damaged(id, &format!("its child {child} does not exist")));
            }
            before = &image[data..data + key];
            elements.push(Element { key: data..data + key, value: data + key..end, flags, child });
            data = end;
        }
        Ok(Self { id, is_leaf, elements, image })
    }

    fn key(&self, element: &Element) -> &[u8] {
        &self.image[element.key.clone()]
    }

    fn damaged(&self, what: &str) -> Error {
        damaged(self.id, what)
    }
}

/// A set of page numbers.
struct Bits(Vec<u64>);

impl Bits {
    fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("there are fewer pages than bytes in a file");
        Self(vec![0; words])
    }

    fn has(&self, page: u64) -> bool {
        self.0[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    fn set(&mut self, page: u64) {
        self.0[(page / 64) as usize] |= 1 << (page % 64);
    }
}
