//! Reading a range of keys at one revision: whole answers, and chunks of long ones.

use std::cell::Cell;

use bytes::Bytes;

use super::{
    KeyRange, Revision,
    error::Error,
    index::{Index, KeyMeta},
    record::{KeyValue, RawKeyValue},
    revision::ROW_KEY_LEN,
    view::View,
};
use crate::{
    pb::etcdserverpb::{
        RangeRequest, RangeResponse, ResponseHeader,
        range_request::{SortOrder, SortTarget},
    },
    storage::{Bucket, Storage},
};

/// Answers a range from a view. The header carries the revision only.
pub fn range(view: &View, storage: &dyn Storage, req: &RangeRequest) -> Result<RangeResponse, Error> {
    State::of(view, &StorageRows(storage)).range(req)
}

/// As [`range`], but fails with [`Error::TooLong`] instead of reading more than `bounds`.
pub fn range_within(
    view: &View,
    storage: &dyn Storage,
    bounds: Bounds,
    req: &RangeRequest,
) -> Result<RangeResponse, Error> {
    State::of(view, &StorageRows(storage)).within(bounds).range(req)
}

/// About how many bytes [`range`] holds while it makes its answer. Looks at the index alone.
pub fn weight(view: &View, req: &RangeRequest) -> usize {
    let range = KeyRange::new(&req.key, &req.range_end);
    let at = if req.revision > 0 { req.revision.min(view.revision) } else { view.revision };
    let (mut picks, mut bytes) = (0, 0);
    if !req.count_only && !range.is_empty() {
        view.index.visit(range, at, &mut |key, meta| {
            if passes(req, &meta) {
                picks += 1;
                bytes += answer_bytes(req, key, &meta);
            }
            true
        });
    }
    let kept = match usize::try_from(req.limit) {
        // Sorting by value needs all of them.
        Ok(limit) if (1..picks).contains(&limit) && !is_sorted_by_value(req) => bytes / picks * limit,
        _ => bytes,
    };
    picks * size_of::<Pick>() + kept
}

/// How much a read may look at.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub keys: usize,
    /// Of the rows it needs, or of the keys where it needs no rows.
    pub bytes: usize,
}

/// The stored record of a put, `None` if it is not there (any more).
pub fn record(storage: &dyn Storage, rev: Revision) -> Result<Option<RawKeyValue>, Error> {
    Ok(storage.get(Bucket::Key, &rev.to_row_key(false))?.map(RawKeyValue))
}

pub(super) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

/// Where records are found.
pub(super) trait Rows {
    fn row(&self, rev: Revision) -> Result<RawKeyValue, Error>;

    /// The records of `revs`, which ascend, handed out in that order.
    fn rows(&self, revs: &[Revision], take: &mut dyn FnMut(RawKeyValue)) -> Result<(), Error> {
        for rev in revs {
            take(self.row(*rev)?);
        }
        Ok(())
    }
}

/// The rows of a reader: all in storage, unless a newer compaction took them.
pub(super) struct StorageRows<'a>(pub &'a dyn Storage);

/// Rows fetched in one go: one scan if they lie close together, else one look-up each.
const FETCH_GROUP: usize = 64;
/// A scan passes over rows of other keys; it pays off up to about this many for each row wanted.
const SCAN_SPREAD_MAX: i64 = 4;

impl Rows for StorageRows<'_> {
    fn row(&self, rev: Revision) -> Result<RawKeyValue, Error> {
        record(self.0, rev)?.ok_or(Error::ViewOutdated)
    }

    fn rows(&self, revs: &[Revision], take: &mut dyn FnMut(RawKeyValue)) -> Result<(), Error> {
        for group in revs.chunks(FETCH_GROUP) {
            let (first, last) = (group[0], group[group.len() - 1]);
            if group.len() < FETCH_GROUP || last.main - first.main > SCAN_SPREAD_MAX * FETCH_GROUP as i64 {
                for rev in group {
                    take(self.row(*rev)?);
                }
                continue;
            }
            let mut wanted = group.iter();
            let mut next = wanted.next().map(|r| r.to_row_key(false));
            let end = last.to_row_key(true);
            self.0.scan(Bucket::Key, &first.to_row_key(false), &end, &mut |key, value| {
                if next.as_deref() == Some(key) {
                    take(RawKeyValue(value));
                    next = wanted.next().map(|r| r.to_row_key(false));
                }
                next.is_some()
            })?;
            if next.is_some() {
                return Err(Error::ViewOutdated);
            }
        }
        Ok(())
    }
}

/// One state of the key space that can be read: a view's, or the writer's in the middle of a transaction.
pub(super) struct State<'a> {
    pub index: &'a Index,
    pub rows: &'a dyn Rows,
    /// Newest revision whose changes the index holds.
    pub revision: i64,
    pub compact_revision: i64,
    /// What may still be looked at; `None`: all.
    left: Option<Cell<Bounds>>,
}

impl<'a> State<'a> {
    pub fn new(index: &'a Index, rows: &'a dyn Rows, revision: i64, compact_revision: i64) -> Self {
        Self { index, rows, revision, compact_revision, left: None }
    }

    pub fn of(view: &'a View, rows: &'a dyn Rows) -> Self {
        Self::new(&view.index, rows, view.revision, view.compact_revision)
    }

    pub fn within(self, bounds: Bounds) -> Self {
        Self { left: Some(Cell::new(bounds)), ..self }
    }

    /// Counts one more key looked at, and `bytes` that it adds to what is read. False: that is too much.
    pub fn may_look(&self, bytes: usize) -> bool {
        let Some(left) = &self.left else { return true };
        let Bounds { keys, bytes: room } = left.get();
        let (Some(keys), Some(room)) = (keys.checked_sub(1), room.checked_sub(bytes)) else { return false };
        left.set(Bounds { keys, bytes: room });
        true
    }

    /// The revision a range reads at.
    fn read_revision(&self, asked: i64) -> Result<i64, Error> {
        match asked {
            r if r > self.revision => Err(Error::FutureRev),
            r if r <= 0 => Ok(self.revision),
            r if r < self.compact_revision => Err(Error::Compacted),
            r => Ok(r),
        }
    }

    pub fn range(&self, req: &RangeRequest) -> Result<RangeResponse, Error> {
        let at = self.read_revision(req.revision)?;
        let range = KeyRange::new(&req.key, &req.range_end);
        let mut answer = RangeResponse { header: header(self.revision), ..Default::default() };
        if req.count_only {
            answer.count = self.count(range, at);
            return Ok(answer);
        }
        if range.is_single() {
            if let Some(meta) = self.index.get(&req.key, at) {
                answer.count = 1;
                if passes(req, &meta) {
                    if !self.may_look(answer_bytes(req, &req.key, &meta)) {
                        return Err(Error::TooLong);
                    }
                    answer.kvs = self.records(req, vec![Pick { key: req.key.clone(), meta }])?;
                }
            }
            return Ok(answer);
        }
        if range.is_empty() {
            return Ok(answer);
        }

        let limit = usize::try_from(req.limit).ok().filter(|l| *l > 0).unwrap_or(usize::MAX);
        let plan = Plan::new(req);
        // One key more than the limit tells whether there are more.
        let stop = if plan.stops_early { limit.saturating_add(1) } else { usize::MAX };
        let mut picks = Vec::new();
        let mut seen = 0;
        let mut too_long = false;
        self.index.visit(range, at, &mut |key, meta| {
            seen += 1;
            let is_picked = passes(req, &meta);
            // The key that only tells that there are more is not read.
            let only_tells = plan.stops_early && seen > limit;
            let bytes = if is_picked { answer_bytes(req, key, &meta) } else { 0 };
            too_long = !only_tells && !self.may_look(bytes);
            if too_long {
                return false;
            }
            if is_picked {
                let key = if req.keys_only { Bytes::copy_from_slice(key) } else { Bytes::new() };
                picks.push(Pick { key, meta });
            }
            seen < stop
        });
        if too_long {
            return Err(Error::TooLong);
        }
        answer.count = if seen < stop { seen as i64 } else { self.count(range, at) };
        answer.more = picks.len() > limit;

        answer.kvs = if plan.target == SortTarget::Value {
            self.sorted_by_value(req, picks, plan.descending, limit)?
        } else {
            plan.sort(&mut picks);
            picks.truncate(limit);
            self.records(req, picks)?
        };
        Ok(answer)
    }

    fn count(&self, range: KeyRange<'_>, at: i64) -> i64 {
        if range.is_empty() { 0 } else { self.index.count(range, at) as i64 }
    }

    /// The records of `picks`, in the same order, as the request wants them.
    fn records(&self, req: &RangeRequest, picks: Vec<Pick>) -> Result<Vec<RawKeyValue>, Error> {
        if !req.keys_only {
            return self.fetch(&picks);
        }
        if is_sorted_by_value(req) {
            return self.fetch(&picks)?.iter().map(without_value).collect();
        }
        // Without values the index knows everything but the lease, which these answers leave out (KV-25).
        Ok(picks.into_iter().map(Pick::into_key_record).collect())
    }

    /// The records of `picks`, in the same order; read in revision order, as they lie on disk.
    fn fetch(&self, picks: &[Pick]) -> Result<Vec<RawKeyValue>, Error> {
        if let [pick] = picks {
            return Ok(vec![self.rows.row(pick.meta.modified)?]);
        }
        let mut order: Vec<(Revision, usize)> =
            picks.iter().enumerate().map(|(place, pick)| (pick.meta.modified, place)).collect();
        order.sort_unstable();
        let revs: Vec<Revision> = order.iter().map(|(rev, _)| *rev).collect();
        let mut places = order.iter().map(|(_, place)| *place);
        let mut out = vec![RawKeyValue::default(); picks.len()];
        self.rows.rows(&revs, &mut |row| {
            let place = places.next().expect("one place for each row asked for");
            out[place] = row;
        })?;
        Ok(out)
    }

    fn sorted_by_value(
        &self,
        req: &RangeRequest,
        picks: Vec<Pick>,
        descending: bool,
        limit: usize,
    ) -> Result<Vec<RawKeyValue>, Error> {
        let mut rows = self
            .fetch(&picks)?
            .into_iter()
            .map(|raw| Ok((decode(&raw)?.value, raw)))
            .collect::<Result<Vec<_>, Error>>()?;
        rows.sort_by(|a, b| if descending { b.0.cmp(&a.0) } else { a.0.cmp(&b.0) });
        rows.truncate(limit);
        rows.into_iter().map(|(_, raw)| if req.keys_only { without_value(&raw) } else { Ok(raw) }).collect()
    }
}

/// A key chosen for the answer. `key` is filled in only where the answer is made without the row.
struct Pick {
    key: Bytes,
    meta: KeyMeta,
}

impl Pick {
    fn into_key_record(self) -> RawKeyValue {
        KeyValue {
            key: self.key,
            create_revision: self.meta.created,
            mod_revision: self.meta.modified.main,
            version: self.meta.version,
            ..Default::default()
        }
        .to_raw()
    }
}

/// What a key adds to what an answer holds.
fn answer_bytes(req: &RangeRequest, key: &[u8], meta: &KeyMeta) -> usize {
    if req.keys_only && !is_sorted_by_value(req) { key.len() + KEY_RECORD_BYTES } else { meta.row_bytes as usize }
}

/// A key's record without its value, at most, beside the key: three numbers and five field heads.
const KEY_RECORD_BYTES: usize = 48;

pub(super) fn decode(raw: &RawKeyValue) -> Result<KeyValue, Error> {
    raw.decode_record().map_err(Error::damaged)
}

fn without_value(raw: &RawKeyValue) -> Result<RawKeyValue, Error> {
    Ok(KeyValue { value: Bytes::new(), ..decode(raw)? }.to_raw())
}

fn is_sorted_by_value(req: &RangeRequest) -> bool {
    req.sort_target == SortTarget::Value as i32
}

fn has_filter(req: &RangeRequest) -> bool {
    [req.min_mod_revision, req.max_mod_revision, req.min_create_revision, req.max_create_revision] != [0; 4]
}

fn passes(req: &RangeRequest, meta: &KeyMeta) -> bool {
    let within = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    within(meta.modified.main, req.min_mod_revision, req.max_mod_revision)
        && within(meta.created, req.min_create_revision, req.max_create_revision)
}

/// How the picked keys become the answer.
struct Plan {
    target: SortTarget,
    descending: bool,
    /// The limit may stop the walk over the index.
    stops_early: bool,
}

impl Plan {
    fn new(req: &RangeRequest) -> Self {
        // Numbers outside the enums are refused before; here they mean the default.
        let order = SortOrder::try_from(req.sort_order).unwrap_or(SortOrder::None);
        let target = SortTarget::try_from(req.sort_target).unwrap_or(SortTarget::Key);
        // KV-22: without an order the limit stops the walk even when another target sorts what it found.
        let in_key_order = order == SortOrder::None || (order == SortOrder::Ascend && target == SortTarget::Key);
        Self { target, descending: order == SortOrder::Descend, stops_early: in_key_order && !has_filter(req) }
    }

    /// Sorts picks, which come in ascending key order, by anything but the value.
    fn sort(&self, picks: &mut [Pick]) {
        let by: fn(&Pick) -> i64 = match self.target {
            SortTarget::Key | SortTarget::Value => {
                if self.descending {
                    picks.reverse();
                }
                return;
            }
            SortTarget::Version => |p| p.meta.version,
            SortTarget::Create => |p| p.meta.created,
            SortTarget::Mod => |p| p.meta.modified.main,
        };
        if self.descending {
            picks.sort_by_key(|p| std::cmp::Reverse(by(p)));
        } else {
            picks.sort_by_key(by);
        }
    }
}

/// A long range in default order, read chunk by chunk at one revision, each from the newest view.
#[derive(Clone, Debug)]
pub struct RangeCursor {
    /// The revision all chunks are read at.
    revision: i64,
    header_revision: i64,
    next_key: Bytes,
    range_end: Bytes,
    keys_only: bool,
    /// All keys of the range.
    count: i64,
    /// The limit leaves keys out.
    more: bool,
    /// Keys still to be handed out.
    left: usize,
    done: bool,
}

impl RangeCursor {
    /// True if `req` can be read in chunks: in key order and without revision filters.
    pub fn supports(req: &RangeRequest) -> bool {
        let plan = Plan::new(req);
        plan.stops_early && plan.target == SortTarget::Key
    }

    /// Begins a read that [`Self::supports`] allows.
    pub fn new(view: &View, storage: &dyn Storage, req: &RangeRequest) -> Result<Self, Error> {
        let rows = StorageRows(storage);
        let state = State::of(view, &rows);
        let revision = state.read_revision(req.revision)?;
        let count = state.count(KeyRange::new(&req.key, &req.range_end), revision);
        let wanted = match req.limit {
            _ if req.count_only => 0,
            limit if limit > 0 => count.min(limit),
            _ => count,
        };
        Ok(Self {
            revision,
            header_revision: view.revision,
            next_key: req.key.clone(),
            range_end: req.range_end.clone(),
            keys_only: req.keys_only,
            count,
            more: !req.count_only && wanted < count,
            left: wanted as usize,
            done: false,
        })
    }

    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Keys of the whole range at the revision read.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// Whether the limit leaves keys out.
    pub fn more(&self) -> bool {
        self.more
    }

    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Bytes of the records of all keys still to come as they stand in an encoded answer. Looks at the index alone.
    pub fn encoded_bytes(&self, view: &View) -> u64 {
        let (mut left, mut bytes) = (self.left, 0);
        if left > 0 {
            view.index.visit(KeyRange::new(&self.next_key, &self.range_end), self.revision, &mut |key, meta| {
                let record = if self.keys_only {
                    Pick { key: Bytes::copy_from_slice(key), meta }.into_key_record().0.len()
                } else {
                    meta.row_bytes as usize - ROW_KEY_LEN
                };
                bytes += (1 + prost::length_delimiter_len(record) + record) as u64;
                left -= 1;
                left > 0
            });
        }
        bytes
    }

    /// The next keys, at least one unless the whole range has none. The last chunk alone has header, `more` and
    /// `count`, and is empty only if the answer has no keys. `max_bytes` bounds the rows, not counting the first.
    pub fn next_chunk(
        &mut self,
        view: &View,
        storage: &dyn Storage,
        max_keys: usize,
        max_bytes: usize,
    ) -> Result<RangeResponse, Error> {
        assert!(!self.done, "a cursor was read past its end");
        if self.revision < view.compact_revision {
            return Err(Error::Compacted);
        }
        assert!(view.revision >= self.header_revision, "views went backwards under a cursor");

        let take = self.left.min(max_keys.max(1));
        let mut picks: Vec<Pick> = Vec::new();
        let mut bytes = 0;
        let mut last_key = Vec::new();
        if take > 0 {
            let range = KeyRange::new(&self.next_key, &self.range_end);
            view.index.visit(range, self.revision, &mut |key, meta| {
                bytes += if self.keys_only { key.len() + KEY_RECORD_BYTES } else { meta.row_bytes as usize };
                if !picks.is_empty() && bytes > max_bytes {
                    return false;
                }
                let copy = if self.keys_only { Bytes::copy_from_slice(key) } else { Bytes::new() };
                picks.push(Pick { key: copy, meta });
                last_key.clear();
                last_key.extend_from_slice(key);
                picks.len() < take
            });
            assert!(!picks.is_empty(), "keys counted at a pinned revision are gone");
        }
        let left = self.left - picks.len();
        let kvs = if self.keys_only {
            picks.into_iter().map(Pick::into_key_record).collect()
        } else {
            State::of(view, &StorageRows(storage)).fetch(&picks)?
        };

        let mut chunk = RangeResponse { kvs, ..Default::default() };
        let delivered_all = left == 0;
        if delivered_all {
            chunk.header = header(self.header_revision);
            chunk.count = self.count;
            chunk.more = self.more;
        }
        last_key.push(0);
        self.next_key = last_key.into();
        self.left = left;
        self.done = delivered_all;
        Ok(chunk)
    }
}
