//! Files written and read back against a model, and damaged in every way.

use std::{collections::BTreeMap, fs::File, io::Write};

use bytes::{BufMut, Bytes};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    format::{BRANCH, FREELIST, LEAF, META, Meta, NO_FREELIST, PAGE_HEADER, PageHeader},
    *,
};
use crate::snapshot::Error;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;
type FoundRows = Vec<(Bytes, Bytes)>;
type Found = Vec<(Vec<u8>, FoundRows)>;
type BucketSpec<'a> = (&'a str, &'a [(&'a [u8], &'a [u8])]);
type Model = BTreeMap<Vec<u8>, Rows>;

fn fill(model: &Model, mut writer: Writer<'_>) -> Layout {
    for (name, rows) in model {
        writer.bucket(name).unwrap();
        for (key, value) in rows {
            writer.row(key, value).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn written(model: &Model) -> Vec<u8> {
    let layout = fill(model, Writer::measure());
    let mut out = Vec::new();
    let mut sink = |chunk: Bytes| {
        assert!(chunk.len() <= CHUNK);
        out.extend_from_slice(&chunk);
        Ok(())
    };
    assert_eq!(fill(model, Writer::stream(&layout, &mut sink)), layout);
    assert_eq!(out.len() as u64, layout.bytes());
    out
}

#[derive(Default)]
struct Collect(Found);

impl Visitor for Collect {
    fn bucket(&mut self, name: &[u8]) -> Result<(), Error> {
        self.0.push((name.to_vec(), Vec::new()));
        Ok(())
    }

    fn row(&mut self, key: Bytes, value: Bytes) -> Result<(), Error> {
        self.0.last_mut().unwrap().1.push((key, value));
        Ok(())
    }
}

fn read(bytes: &[u8]) -> Result<Found, Error> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    read_file(file)
}

fn read_file(file: File) -> Result<Found, Error> {
    let mut found = Collect::default();
    Reader::open(Box::new(file))?.read(&mut found)?;
    Ok(found.0)
}

fn assert_holds(bytes: &[u8], model: &Model) {
    let found = read(bytes).unwrap();
    let expected: Vec<_> = model
        .iter()
        .map(|(name, rows)| {
            let rows: Vec<_> = rows.iter().map(|(k, v)| (Bytes::from(k.clone()), Bytes::from(v.clone()))).collect();
            (name.clone(), rows)
        })
        .collect();
    assert!(found == expected, "what was read is not what was written");
}

fn damage(result: Result<Found, Error>) -> String {
    match result {
        Err(Error::Damaged(text)) => text,
        other => panic!("not found damaged: {other:?}"),
    }
}

fn model(buckets: &[BucketSpec<'_>]) -> Model {
    let rows = |rows: &[(&[u8], &[u8])]| rows.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
    buckets.iter().map(|(name, list)| (name.as_bytes().to_vec(), rows(list))).collect()
}

fn numbered(rows: u64, value: usize) -> Rows {
    (0..rows).map(|n| (n.to_be_bytes().to_vec(), vec![n as u8; value])).collect()
}

/// The page a file's header at `page` describes.
fn header(bytes: &[u8], page: usize) -> PageHeader {
    PageHeader::get(&bytes[page * PAGE_SIZE..]).unwrap()
}

#[test]
fn small_buckets_are_inline_and_large_ones_have_pages() {
    let mut model = model(&[("empty", &[]), ("one", &[(b"k", b"")])]);
    assert_eq!(written(&model).len(), 3 * PAGE_SIZE, "two metas and the root");
    assert_holds(&written(&model), &model);
    // 16 + (16 + 8 + 1) * n <= 1024
    model.insert(b"n".to_vec(), numbered(40, 1));
    assert_eq!(written(&model).len(), 3 * PAGE_SIZE);
    model.insert(b"n".to_vec(), numbered(41, 1));
    assert_eq!(written(&model).len(), 4 * PAGE_SIZE);
    assert_holds(&written(&model), &model);
    let none = Model::new();
    assert_holds(&written(&none), &none);
}

#[test]
fn every_page_is_used_once_and_no_branch_has_a_lone_child() {
    for rows in [1, 2, 3, 50, 5_000, 20_000, 20_001] {
        for value in [10, 700, 2_100] {
            let bytes = written(&Model::from([(b"key".to_vec(), numbered(rows, value))]));
            let mut page = 2;
            let mut branches = 0;
            while page * PAGE_SIZE < bytes.len() {
                let header = header(&bytes, page);
                assert_eq!(header.id, page as u64);
                assert!(header.count >= if header.flags == BRANCH { 2 } else { 1 });
                branches += usize::from(header.flags == BRANCH);
                page += 1 + header.overflow as usize;
            }
            assert_eq!(page * PAGE_SIZE, bytes.len());
            if rows >= 20_000 && value >= 700 {
                assert!(branches > 1, "more than one level of branches is tried");
            }
        }
    }
}

#[test]
fn random_trees_read_back_as_written() {
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut model = Model::new();
        for bucket in 0..rng.random_range(0..12) {
            let key_max = [4, 30, 300, 5_000, KEY_MAX][rng.random_range(0..5)];
            let value_max = [0, 20, 300, 5_000, 100_000][rng.random_range(0..5)];
            let count = rng.random_range(0..=(4_000_000 / (key_max + value_max + 50)).min(3_000));
            let rows = (0..count).map(|_| {
                let mut key = vec![0; rng.random_range(1..=key_max)];
                let prefix = key.len().min(8);
                rng.fill(&mut key[..prefix]);
                (key, vec![rng.random(); rng.random_range(0..=value_max)])
            });
            model.insert(format!("bucket{bucket:03}").into_bytes(), rows.collect());
        }
        assert_holds(&written(&model), &model);
    }
}

#[test]
fn value_of_many_pages_passes() {
    let mut rows = numbered(100, 1_000);
    rows.insert(50_u64.to_be_bytes().to_vec(), vec![5; 1_500_000]);
    rows.insert(51_u64.to_be_bytes().to_vec(), vec![6; 3 * PAGE_SIZE - 16 - 16 - 8]);
    let model = Model::from([(b"key".to_vec(), rows)]);
    assert_holds(&written(&model), &model);
}

#[test]
fn rows_that_no_file_can_hold_are_refused() {
    let key = vec![1; KEY_MAX + 1];
    for (key, fits) in [(&b""[..], false), (&key, false), (&key[1..], true)] {
        let mut writer = Writer::measure();
        writer.bucket(b"b").unwrap();
        assert_eq!(writer.row(key, b"").is_ok(), fits);
    }
}

#[test]
#[should_panic(expected = "in the order of their keys")]
fn rows_out_of_order_are_a_bug() {
    let mut writer = Writer::measure();
    writer.bucket(b"b").unwrap();
    writer.row(b"2", b"").unwrap();
    let _ = writer.row(b"1", b"");
}

/// A small file with an inline bucket, a leaf, a branch and an overflowing leaf.
fn sample() -> Vec<u8> {
    let mut model = model(&[("alarm", &[]), ("meta", &[(b"term", b"12345678")])]);
    let mut rows = numbered(60, 100);
    rows.insert(vec![9], vec![1; 5_000]);
    model.insert(b"key".to_vec(), rows);
    written(&model)
}

/// Every bit of every number of the format can be wrong; values and padding have no checksum.
#[test]
fn no_flipped_byte_panics_and_only_rows_can_differ_unnoticed() {
    let sound = sample();
    let expected = read(&sound).unwrap();
    // The last value of a page may grow into the padding.
    let shape = |found: &[(Vec<u8>, FoundRows)]| -> Vec<usize> { found.iter().map(|(_, rows)| rows.len()).collect() };
    let mut unnoticed = 0;
    for at in 0..sound.len() {
        for mask in [0xff, 1 << (at % 8)] {
            let mut bytes = sound.clone();
            bytes[at] ^= mask;
            if let Ok(found) = read(&bytes) {
                assert_eq!(shape(&found), shape(&expected), "byte {at}");
                unnoticed += usize::from(found != expected);
            }
        }
    }
    // Values, and here and there a key that keeps its place: 11,000 bytes of them.
    assert!(unnoticed > 0 && unnoticed < 2 * 12_000, "{unnoticed}");
}

#[test]
fn every_truncation_is_found() {
    let sound = sample();
    for len in 0..sound.len() {
        damage(read(&sound[..len]));
    }
    let mut longer = sound.clone();
    longer.extend_from_slice(&[7; 10_000]);
    assert_eq!(read(&longer).unwrap(), read(&sound).unwrap(), "what follows the last page does not matter");
}

#[test]
fn random_garbage_in_pages_never_panics() {
    let sound = sample();
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..3_000 {
        let mut bytes = sound.clone();
        for _ in 0..rng.random_range(1..6) {
            // Numbers near the ones that matter, in the pages behind the metas.
            let at = rng.random_range(2 * PAGE_SIZE..bytes.len() - 8);
            let number: u64 = [0, 1, 2, 3, 16, 4096, u64::MAX, 1 << 31, rng.random()][rng.random_range(0..9)];
            let width = [1, 2, 4, 8][rng.random_range(0..4)];
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        let _ = read(&bytes);
    }
}

#[test]
fn either_meta_page_is_enough_and_the_newer_rules() {
    let sound = sample();
    for page in 0..2 {
        let mut bytes = sound.clone();
        bytes[page * PAGE_SIZE + 30] ^= 1;
        assert_eq!(read(&bytes).unwrap(), read(&sound).unwrap());
        bytes[(1 - page) * PAGE_SIZE + 30] ^= 1;
        assert!(damage(read(&bytes)).contains("first two pages"));
    }
    // An older meta with another root is not looked at.
    let mut bytes = sound.clone();
    let mut meta = Meta::get(&bytes[PAGE_HEADER..]).unwrap();
    meta.root = 2;
    replace_meta(&mut bytes, 0, PAGE_SIZE, meta);
    assert_eq!(read(&bytes).unwrap(), read(&sound).unwrap());
    meta.txid = 7;
    replace_meta(&mut bytes, 0, PAGE_SIZE, meta);
    damage(read(&bytes));
}

fn replace_meta(bytes: &mut [u8], number: u64, page_size: usize, meta: Meta) {
    let mut image = Vec::new();
    PageHeader { id: number, flags: META, count: 0, overflow: 0 }.put(&mut image);
    meta.put(&mut image);
    let at = number as usize * page_size;
    bytes[at..at + image.len()].copy_from_slice(&image);
}

/// Builds files by hand, with pages of any size.
struct ByHand {
    page_size: usize,
    pages: Vec<Vec<u8>>,
}

impl ByHand {
    fn new(page_size: usize) -> Self {
        Self { page_size, pages: vec![Vec::new(); 2] }
    }

    fn leaf(&mut self, rows: &[(&[u8], &[u8], u32)]) -> u64 {
        let mut elements = Vec::new();
        let mut data = Vec::new();
        for (i, (key, value, flags)) in rows.iter().enumerate() {
            elements.put_u32_le(*flags);
            elements.put_u32_le((16 * (rows.len() - i) + data.len()) as u32);
            elements.put_u32_le(key.len() as u32);
            elements.put_u32_le(value.len() as u32);
            data.extend_from_slice(key);
            data.extend_from_slice(value);
        }
        self.page(LEAF, rows.len(), &[elements, data].concat())
    }

    fn branch(&mut self, children: &[(&[u8], u64)]) -> u64 {
        let mut elements = Vec::new();
        let mut data = Vec::new();
        for (i, (key, child)) in children.iter().enumerate() {
            elements.put_u32_le((16 * (children.len() - i) + data.len()) as u32);
            elements.put_u32_le(key.len() as u32);
            elements.put_u64_le(*child);
            data.extend_from_slice(key);
        }
        self.page(BRANCH, children.len(), &[elements, data].concat())
    }

    fn page(&mut self, flags: u16, count: usize, body: &[u8]) -> u64 {
        let id = self.pages.len() as u64;
        let overflow = (16 + body.len()).div_ceil(self.page_size) - 1;
        let mut image = Vec::new();
        PageHeader { id, flags, count: count as u16, overflow: overflow as u32 }.put(&mut image);
        image.extend_from_slice(body);
        self.pages.push(image);
        self.pages.extend(vec![Vec::new(); overflow]);
        id
    }

    /// A leaf of buckets with these root pages, and the metas.
    fn finish(&mut self, buckets: &[(&[u8], u64)], freelist: u64) -> Vec<u8> {
        let headers: Vec<_> =
            buckets.iter().map(|(name, root)| (*name, [root.to_le_bytes(), [0; 8]].concat())).collect();
        let root = self.leaf(&headers.iter().map(|(name, header)| (*name, &header[..], 1)).collect::<Vec<_>>());
        self.finish_at(root, freelist)
    }

    fn finish_at(&self, root: u64, freelist: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.pages.len() * self.page_size];
        for (id, image) in self.pages.iter().enumerate() {
            bytes[id * self.page_size..][..image.len()].copy_from_slice(image);
        }
        for txid in 0..2 {
            let (page_size, pages) = (self.page_size as u32, self.pages.len() as u64);
            replace_meta(&mut bytes, txid, self.page_size, Meta { page_size, root, freelist, pages, txid });
        }
        bytes
    }
}

#[test]
fn files_of_other_page_sizes_are_read() {
    for page_size in [1 << 10, 1 << 13, 1 << 16, 1 << 20] {
        let mut file = ByHand::new(page_size);
        let large = vec![3; 3 * page_size];
        let a = file.leaf(&[(b"a", b"1", 0), (b"b", &large, 0)]);
        let c = file.leaf(&[(b"c", b"3", 0)]);
        let key = file.branch(&[(b"a", a), (b"c", c)]);
        let mut bytes = file.finish(&[(b"key", key)], NO_FREELIST);
        let rows = [(&b"a"[..], &b"1"[..]), (b"b", &large), (b"c", b"3")];
        assert_holds(&bytes, &model(&[("key", &rows)]));
        // Without the first meta the page size is found by trying.
        bytes[20] ^= 1;
        assert_holds(&bytes, &model(&[("key", &rows)]));
    }
}

#[test]
fn stored_list_of_free_pages_is_checked() {
    let numbers = |list: &[u64]| list.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
    let file = |count: usize, list: &[u64], hole: bool| {
        let mut file = ByHand::new(PAGE_SIZE);
        if hole {
            file.pages.push(vec![0xaa; 100]); // page 2
        }
        let key = file.leaf(&[(b"a", b"1", 0)]);
        let freelist = file.page(FREELIST, count, &numbers(list));
        file.finish(&[(b"key", key)], freelist)
    };
    let expected = model(&[("key", &[(b"a", b"1")])]);
    assert_holds(&file(0, &[], false), &expected);
    assert_holds(&file(1, &[2], true), &expected);
    assert_holds(&file(0xffff, &[1, 2], true), &expected);
    assert!(damage(read(&file(0, &[], true))).contains("page 2 is neither in use nor free"));
    assert!(damage(read(&file(1, &[2], false))).contains("in use and free"));
    assert!(damage(read(&file(2, &[2, 2], true))).contains("cannot be free"));
    assert!(damage(read(&file(1, &[99], true))).contains("cannot be free"));
    assert!(damage(read(&file(600, &[2], true))).contains("longer than its pages"));
    assert!(damage(read(&file(0xffff, &[u64::MAX, 2], true))).contains("longer than its pages"));
}

#[test]
fn trees_that_break_the_rules_are_refused() {
    let refused = |build: &dyn Fn(&mut ByHand) -> u64, text: &str| {
        let mut file = ByHand::new(PAGE_SIZE);
        let key = build(&mut file);
        let found = damage(read(&file.finish(&[(b"key", key)], NO_FREELIST)));
        assert!(found.contains(text), "{found:?} has no {text:?}");
    };
    refused(&|f| f.leaf(&[(b"b", b"", 0), (b"a", b"", 0)]), "out of order");
    refused(&|f| f.leaf(&[(b"a", b"", 0), (b"a", b"", 0)]), "out of order");
    refused(&|f| f.leaf(&[(b"", b"", 0)]), "impossible numbers");
    refused(&|f| f.leaf(&[(b"a", b"", 2)]), "impossible numbers");
    refused(&|f| f.leaf(&[(b"a", &[0; 16], 1)]), "bucket within a bucket");
    refused(&|f| f.branch(&[]), "without children");
    refused(&|f| f.branch(&[(b"a", 2)]), "in use twice"); // itself
    refused(&|f| f.branch(&[(b"a", 999)]), "does not exist");
    refused(&|f| f.branch(&[(b"a", 1)]), "does not exist");
    refused(&|_| 999, "no such page");
    refused(&|f| f.page(FREELIST, 0, &[]), "in a tree");
    refused(&|f| f.page(LEAF | BRANCH, 0, &[]), "in a tree");
    refused(
        &|f| {
            let leaf = f.leaf(&[(b"a", b"", 0)]);
            f.branch(&[(b"a", leaf), (b"b", leaf)])
        },
        "in use twice",
    );
    refused(
        &|f| {
            let leaf = f.leaf(&[(b"a", b"", 0)]);
            f.branch(&[(b"b", leaf)])
        },
        "outside of the bounds",
    );
    refused(
        &|f| {
            let left = f.leaf(&[(b"a", b"", 0), (b"c", b"", 0)]);
            let right = f.leaf(&[(b"c", b"", 0)]);
            f.branch(&[(b"a", left), (b"c", right)])
        },
        "outside of the bounds",
    );
    refused(&|f| (0..70).fold(f.leaf(&[(b"a", b"", 0)]), |child, _| f.branch(&[(b"a", child)])), "too deep");

    let mut file = ByHand::new(PAGE_SIZE);
    let root = file.leaf(&[(b"a", b"1", 0)]);
    assert!(damage(read(&file.finish_at(root, NO_FREELIST))).contains("outside of all buckets"));
    let mut file = ByHand::new(PAGE_SIZE);
    let root = file.leaf(&[(b"a", &[0; 15], 1)]);
    assert!(damage(read(&file.finish_at(root, NO_FREELIST))).contains("header is cut"));
    let mut file = ByHand::new(PAGE_SIZE);
    let root = file.leaf(&[(b"a", &[0; 40], 1)]);
    assert!(damage(read(&file.finish_at(root, NO_FREELIST))).contains("without children"));
}

/// Leaves need not be equally deep.
#[test]
fn uneven_tree_is_read() {
    let mut file = ByHand::new(PAGE_SIZE);
    let a = file.leaf(&[(b"a", b"1", 0)]);
    let b = file.leaf(&[(b"b", b"2", 0)]);
    let c = file.leaf(&[(b"c", b"3", 0)]);
    let bc = file.branch(&[(b"b", b), (b"c", c)]);
    let key = file.branch(&[(b"a", a), (b"b", bc)]);
    let bytes = file.finish(&[(b"key", key)], NO_FREELIST);
    assert_holds(&bytes, &model(&[("key", &[(b"a", b"1"), (b"b", b"2"), (b"c", b"3")])]));
}
