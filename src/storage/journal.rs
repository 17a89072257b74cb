//! The end of fjall's journal after power loss, and the note that tells a torn end from damage.
//!
//! fjall appends each batch to its newest journal (`<n>.jnl`) and syncs it only when asked, before it seals
//! it and starts the next, and before it flushes a memtable. So power loss may lose or tear what lies
//! behind the last sync of the newest journal and nothing else, and no table holds a row whose journal
//! record can be lost. Of a torn end fjall accepts some forms and refuses others; this module reads the
//! journals first, cuts the newest behind its last whole batch (a copy of what is cut stays beside) and
//! so leaves exactly the whole batches up to the first hole. Cutting lower, at the last sync, would be wrong:
//! tables of one keyspace may already hold rows of the batches in between, tables of the other not.
//!
//! After each sync the end of what is durable is noted in `synced`. A journal whose whole batches end
//! below the note is damaged, not torn, and refuses.
//!
//! Journal format (fjall 3.1, no compression), little endian. A batch is: `1`, item count u32, seqno u64; items
//! `2`, value type u8, compression u8, keyspace u64, key length u16, value length u32, stored length u32,
//! key, value; `3`, xxh3-64 of the items, `FJL\x03`. Unwritten space is zero.

use super::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const TRAILER: &[u8] = b"FJL\x03";

/// At most this much of a torn end is kept for inspection.
const KEPT_COPY_BYTES: u64 = 16 << 20;

/// What was cut off the newest journal at open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    pub journal: PathBuf,
    /// Length of the journal now: the end of its last whole batch.
    pub kept_bytes: u64,
    pub cut_bytes: u64,
    /// Holds the first part of what was cut.
    pub copy: PathBuf,
}

/// The whole batches found from some position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// Where the last one ends.
    pub(super) end: u64,
    pub(super) batches: u64,
    pub(super) last_seqno: Option<u64>,
}

/// Reads whole batches with ascending seqnos from `from` on, up to the first that is not.
pub(super) fn scan(file: &File, from: u64, last_seqno: Option<u64>) -> io::Result<Scan> {
    let file_len = file.metadata()?.len();
    let mut input = BufReader::with_capacity(1 << 16, file);
    input.seek(SeekFrom::Start(from))?;
    let mut found = Scan { end: from, batches: 0, last_seqno };
    loop {
        match read_batch(&mut input, file_len) {
            Ok(Some(batch)) if found.last_seqno.is_none_or(|last| batch.seqno > last) => {
                found =
                    Scan { end: found.end + batch.bytes, batches: found.batches + 1, last_seqno: Some(batch.seqno) };
            }
            Ok(_) => return Ok(found),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(found),
            Err(e) => return Err(e),
        }
    }
}

struct BatchHead {
    seqno: u64,
    bytes: u64,
}

/// `None` where no whole batch starts.
fn read_batch(input: &mut impl Read, file_len: u64) -> io::Result<Option<BatchHead>> {
    let [START] = read_array(input)? else { return Ok(None) };
    let item_count = u32::from_le_bytes(read_array(input)?);
    let seqno = u64::from_le_bytes(read_array(input)?);
    let mut bytes = 13;
    let mut checksum = Xxh3::new();
    if item_count == 0 {
        return Ok(None);
    }
    for _ in 0..item_count {
        let head: [u8; 21] = read_array(input)?;
        let [ITEM, value_type, 0, _, _, _, _, _, _, _, _, k0, k1, v0, v1, v2, v3, s0, s1, s2, s3] = head else {
            return Ok(None);
        };
        let value_len = u32::from_le_bytes([v0, v1, v2, v3]);
        let stored_len = u32::from_le_bytes([s0, s1, s2, s3]);
        let body = u64::from(u16::from_le_bytes([k0, k1])) + u64::from(stored_len);
        if value_type > 2 || value_len != stored_len || body > file_len {
            return Ok(None);
        }
        checksum.update(&head);
        hash(input, body, &mut checksum)?;
        bytes += 21 + body;
    }
    let [END] = read_array(input)? else { return Ok(None) };
    let expected = u64::from_le_bytes(read_array(input)?);
    let trailer: [u8; TRAILER.len()] = read_array(input)?;
    bytes += 13;
    Ok((trailer == TRAILER && expected == checksum.digest()).then_some(BatchHead { seqno, bytes }))
}

fn read_array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn hash(input: &mut impl Read, mut len: u64, checksum: &mut Xxh3) -> io::Result<()> {
    let mut chunk = [0; 4096];
    while len > 0 {
        let n = len.min(chunk.len() as u64) as usize;
        input.read_exact(&mut chunk[..n])?;
        checksum.update(&chunk[..n]);
        len -= n as u64;
    }
    Ok(())
}

/// The journals as they are before fjall opens them, cut where power loss tore the newest.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) newest: u64,
    /// Length of the newest that fjall must find whole.
    pub(super) newest_end: u64,
    /// Seqno of the last batch in any journal.
    pub(super) last_seqno: Option<u64>,
    pub(super) repaired: Option<Repaired>,
}

pub(super) fn path(rows: &Path, id: u64) -> PathBuf {
    rows.join(format!("{id}.jnl"))
}

/// Checks the journals in `rows` against the note and cuts a torn end, of which a copy goes to `copies`.
pub(super) fn check(rows: &Path, note: Note, copies: &Path) -> Result<Checked, Error> {
    let ids = list(rows)?;
    let newest = *ids.last().ok_or_else(|| damaged(&path(rows, note.journal), "no journal is there"))?;
    if newest < note.journal {
        return Err(damaged(&path(rows, note.journal), "the newest journal is missing"));
    }
    if let Some(gap) = ids.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        return Err(damaged(&path(rows, gap[0] + 1), "the journal is missing"));
    }
    let mut last_seqno = None;
    let mut newest_end = 0;
    let mut repaired = None;
    for id in ids {
        let path = path(rows, id);
        let file = File::open(&path).map_err(|e| failed(&path, e))?;
        let found = scan(&file, 0, last_seqno).map_err(|e| failed(&path, e))?;
        if id == note.journal && found.end < note.length {
            let what = format!("byte {} is damaged, which was synced: {} bytes were", found.end, note.length);
            return Err(damaged(&path, &what));
        }
        let data_end = data_end(&file, found.end).map_err(|e| failed(&path, e))?;
        if data_end > found.end {
            if id != newest {
                return Err(damaged(&path, &format!("byte {} of a completed journal is damaged", found.end)));
            }
            repaired = Some(cut(&path, found.end, data_end, copies)?);
        }
        last_seqno = found.last_seqno;
        newest_end = found.end;
    }
    Ok(Checked { newest, newest_end, last_seqno, repaired })
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::Refused(format!(
        "{}: {what}; the disk has lost or changed rows that were safe. Move the member's data directory away and \
         let it join again, or restore a backup",
        path.display()
    ))
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::Fatal(format!("{}: {error}", path.display()))
}

/// Journal numbers, ascending.
pub(super) fn list(rows: &Path) -> Result<Vec<u64>, Error> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(rows).map_err(|e| failed(rows, e))? {
        let name = entry.map_err(|e| failed(rows, e))?.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".jnl")) else { continue };
        let id = id.parse().map_err(|_| {
            let path = rows.join(&name);
            Error::Refused(format!("{}: no journal of this store; remove it", path.display()))
        })?;
        ids.push(id);
    }
    ids.sort_unstable();
    Ok(ids)
}

/// End of the last non-zero byte from `from` on, or `from`.
fn data_end(file: &File, from: u64) -> io::Result<u64> {
    let mut chunk = vec![0; 1 << 16];
    let (mut at, mut end) = (from, from);
    loop {
        let n = file.read_at(&mut chunk, at)?;
        if n == 0 {
            return Ok(end);
        }
        // Nearly always all zero, which this form finds many bytes at a time.
        if chunk[..n].iter().fold(0, |any, byte| any | byte) != 0 {
            let last = chunk[..n].iter().rposition(|byte| *byte != 0).expect("one is not zero");
            end = at + last as u64 + 1;
        }
        at += n as u64;
    }
}

fn cut(path: &Path, at: u64, data_end: u64, copies: &Path) -> Result<Repaired, Error> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("journal");
    let copy = copies.join(format!("torn-{name}-{at}"));
    keep_copy(path, at, data_end, &copy).map_err(|e| failed(&copy, e))?;
    let file = OpenOptions::new().write(true).open(path).map_err(|e| failed(path, e))?;
    file.set_len(at).and_then(|()| file.sync_all()).map_err(|e| failed(path, e))?;
    Ok(Repaired { journal: path.to_owned(), kept_bytes: at, cut_bytes: data_end - at, copy })
}

/// One copy is kept at a time: the newest.
fn keep_copy(path: &Path, from: u64, to: u64, copy: &Path) -> io::Result<()> {
    let dir = copy.parent().expect("a copy lies in a directory");
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("torn-") {
            std::fs::remove_file(entry.path())?;
        }
    }
    let mut source = File::open(path)?;
    source.seek(SeekFrom::Start(from))?;
    let mut target = File::create(copy)?;
    io::copy(&mut source.take((to - from).min(KEPT_COPY_BYTES)), &mut target)?;
    target.sync_all()
}

/// How far the journal was durable at the last sync. Journals before it are durable to their end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) journal: u64,
    pub(super) length: u64,
}

const NOTE_MAGIC: &[u8; 8] = b"actdsync";
const NOTE_BYTES: usize = 36;
/// Two slots, written in turn, in different sectors: a torn write leaves the other.
const NOTE_SLOT_DISTANCE: u64 = 4096;

/// The file `synced`.
pub(super) struct NoteFile {
    file: File,
    path: PathBuf,
    generation: u64,
}

impl NoteFile {
    /// With a note that promises nothing. The caller syncs the directory.
    pub(super) fn create(path: &Path) -> Result<(), Error> {
        let file = File::create_new(path).map_err(|e| failed(path, e))?;
        let mut notes = Self { file, path: path.to_owned(), generation: 0 };
        notes.write(Note::default())
    }

    pub(super) fn open(path: &Path) -> Result<(Self, Note), Error> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| failed(path, e))?;
        let mut newest: Option<(u64, Note)> = None;
        for slot in 0..2 {
            let mut bytes = [0; NOTE_BYTES];
            match file.read_exact_at(&mut bytes, slot * NOTE_SLOT_DISTANCE) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(e) => return Err(failed(path, e)),
            }
            if let Some(found) = decode_note(&bytes)
                && newest.is_none_or(|(generation, _)| found.0 > generation)
            {
                newest = Some(found);
            }
        }
        let (generation, note) = newest.ok_or_else(|| damaged(path, "the note of what was synced is damaged"))?;
        Ok((Self { file, path: path.to_owned(), generation }, note))
    }

    /// Durable when it returns.
    pub(super) fn write(&mut self, note: Note) -> Result<(), Error> {
        self.generation += 1;
        let bytes = encode_note(self.generation, note);
        let at = self.generation % 2 * NOTE_SLOT_DISTANCE;
        self.file.write_all_at(&bytes, at).and_then(|()| self.file.sync_data()).map_err(|e| failed(&self.path, e))
    }
}

fn encode_note(generation: u64, note: Note) -> [u8; NOTE_BYTES] {
    let mut bytes = [0; NOTE_BYTES];
    bytes[..8].copy_from_slice(NOTE_MAGIC);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&note.journal.to_le_bytes());
    bytes[24..32].copy_from_slice(&note.length.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..32]);
    bytes[32..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode_note(bytes: &[u8; NOTE_BYTES]) -> Option<(u64, Note)> {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let crc = u32::from_le_bytes(bytes[32..].try_into().expect("four bytes"));
    (&bytes[..8] == NOTE_MAGIC && crc32c::crc32c(&bytes[..32]) == crc)
        .then(|| (word(8), Note { journal: word(16), length: word(24) }))
}

/// Makes what the newest journal holds durable, and notes it. Uses file handles of its own, because fjall
/// holds its journal's lock during a sync and every commit would wait.
pub(super) struct Syncer {
    rows: PathBuf,
    journal: u64,
    file: File,
    scanned: Scan,
    notes: NoteFile,
    noted: Note,
    /// Off once a journal came and went between two syncs, unread.
    counts_all: bool,
}

impl Syncer {
    pub(super) fn new(rows: &Path, checked: &Checked, notes: NoteFile, noted: Note) -> Result<Self, Error> {
        let path = path(rows, checked.newest);
        Ok(Self {
            rows: rows.to_owned(),
            journal: checked.newest,
            file: File::open(&path).map_err(|e| failed(&path, e))?,
            scanned: Scan { end: checked.newest_end, batches: 0, last_seqno: checked.last_seqno },
            notes,
            noted,
            counts_all: true,
        })
    }

    /// `committed` batches have been committed since the store was opened; all must be found.
    pub(super) fn sync(&mut self, committed: u64) -> Result<(), Error> {
        self.advance()?;
        // Looked at before the scan: a journal is synced to its end before the next one appears.
        while path(&self.rows, self.journal + 1).exists() || self.is_gone() {
            self.next_journal()?;
            self.advance()?;
        }
        if self.counts_all && self.scanned.batches < committed {
            let path = path(&self.rows, self.journal);
            let text = format!("{}: holds {} of {committed} batches", path.display(), self.scanned.batches);
            return Err(Error::Fatal(text));
        }
        let note = Note { journal: self.journal, length: self.scanned.end };
        if note == self.noted {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| failed(&path(&self.rows, self.journal), e))?;
        self.notes.write(note)?;
        self.noted = note;
        Ok(())
    }

    fn is_gone(&self) -> bool {
        !path(&self.rows, self.journal).exists()
    }

    fn advance(&mut self) -> Result<(), Error> {
        let found = scan(&self.file, self.scanned.end, self.scanned.last_seqno)
            .map_err(|e| failed(&path(&self.rows, self.journal), e))?;
        self.scanned = Scan { batches: self.scanned.batches + found.batches, ..found };
        Ok(())
    }

    fn next_journal(&mut self) -> Result<(), Error> {
        // What came between the last look and the seal.
        self.advance()?;
        let mut next = self.journal + 1;
        let mut opened = File::open(path(&self.rows, next));
        if opened.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            self.counts_all = false;
            next = *list(&self.rows)?.last().ok_or_else(|| damaged(&self.rows, "no journal is there"))?;
            opened = File::open(path(&self.rows, next));
        }
        self.file = opened.map_err(|e| failed(&path(&self.rows, next), e))?;
        self.journal = next;
        self.scanned.end = 0;
        Ok(())
    }
}
