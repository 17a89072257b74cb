//! Transactions: comparing, checking, executing; and what a request counts against the quota.
//!
//! A transaction runs in three steps, so that a failure leaves no trace. All compares, nested ones included, are
//! evaluated against the state before it ([`Branch`]); the branches they select are checked; then they are executed.

use super::{
    KeyRange,
    error::Error,
    index::KeyMeta,
    range::{self, Bounds, State, StorageRows, decode, header},
    store::{Leases, Store, Write},
    view::View,
};
use crate::{
    pb::etcdserverpb::{
        Compare, InternalRaftRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader, ResponseOp, TxnRequest,
        TxnResponse,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
        response_op::Response,
    },
    storage::Storage,
};

/// True if the transaction is served by a read: it has nothing but ranges, in both branches.
pub fn is_read_only(req: &TxnRequest) -> bool {
    req.success.iter().chain(&req.failure).all(|op| matches!(op.request, Some(Request::RequestRange(_)) | None))
}

/// Answers a read-only transaction from a view, and how many ranges it has looked at. The header carries the revision
/// only.
pub fn txn_read_only(view: &View, storage: &dyn Storage, req: &TxnRequest) -> Result<(TxnResponse, u64), Error> {
    read_only(&State::of(view, &StorageRows(storage)), req)
}

/// As [`txn_read_only`], but fails with [`Error::TooLong`] instead of reading more than `bounds`.
pub fn txn_read_only_within(
    view: &View,
    storage: &dyn Storage,
    bounds: Bounds,
    req: &TxnRequest,
) -> Result<(TxnResponse, u64), Error> {
    read_only(&State::of(view, &StorageRows(storage)).within(bounds), req)
}

/// About how many bytes [`txn_read_only`] holds while it makes its answer, whichever branch it takes.
pub fn weight(view: &View, req: &TxnRequest) -> usize {
    let branch = |ops: &[RequestOp]| -> usize {
        ops.iter()
            .map(|op| match &op.request {
                Some(Request::RequestRange(req)) => range::weight(view, req),
                _ => 0,
            })
            .sum()
    };
    branch(&req.success).max(branch(&req.failure))
}

fn read_only(state: &State<'_>, req: &TxnRequest) -> Result<(TxnResponse, u64), Error> {
    debug_assert!(is_read_only(req));
    let branch = Branch::select(state, req)?;
    for op in branch.ops(req) {
        if let Some(Request::RequestRange(range)) = &op.request {
            check_range(state, range)?;
        }
    }
    let mut responses = Vec::new();
    for op in branch.ops(req) {
        if let Some(Request::RequestRange(range)) = &op.request {
            responses.push(ResponseOp { response: Some(Response::ResponseRange(state.range(range)?)) });
        }
    }
    let looks = branch.compared + responses.len() as u64;
    Ok((TxnResponse { header: header(state.revision), succeeded: branch.succeeded, responses }, looks))
}

/// What a request counts against the space quota before it is applied; 0 always passes.
pub fn quota_cost(req: &InternalRaftRequest) -> u64 {
    if let Some(put) = &req.put {
        put_cost(put)
    } else if let Some(txn) = &req.txn {
        txn_cost(txn)
    } else if req.lease_grant.is_some() {
        LEASE_GRANT_COST
    } else {
        0
    }
}

const PUT_COST: u64 = 256;
pub const LEASE_GRANT_COST: u64 = 64;

pub fn put_cost(req: &PutRequest) -> u64 {
    PUT_COST + (req.key.len() + req.value.len()) as u64
}

pub fn txn_cost(req: &TxnRequest) -> u64 {
    let branch = |ops: &[RequestOp]| -> u64 {
        ops.iter()
            .map(|op| match &op.request {
                Some(Request::RequestPut(put)) => put_cost(put),
                Some(Request::RequestTxn(txn)) => txn_cost(txn),
                _ => 0,
            })
            .sum()
    };
    branch(&req.success).max(branch(&req.failure))
}

impl Store {
    pub fn txn(&mut self, req: &TxnRequest, leases: &mut dyn Leases) -> Result<TxnResponse, Error> {
        let rows = self.rows();
        let state = self.state(self.revision, &rows);
        let branch = Branch::select(&state, req)?;
        let mut checks = Checks { deleted: Vec::new(), looks: 0 };
        self.check(&state, req, &branch, leases, &mut checks)?;
        let looks = branch.compared + checks.looks;
        self.tally.ranges += looks;
        self.tally.txns += u64::from(looks > 1);

        let mut write = self.begin();
        let mut response = self.execute(&mut write, req, &branch, leases)?;
        response.header = header(write.revision());
        self.end(write);
        Ok(response)
    }

    /// Whether every operation that will run can run, judged by the state before the transaction.
    fn check<'r>(
        &self,
        state: &State<'_>,
        req: &'r TxnRequest,
        branch: &Branch,
        leases: &dyn Leases,
        checks: &mut Checks<'r>,
    ) -> Result<(), Error> {
        let mut nested = branch.nested.iter();
        for op in branch.ops(req) {
            match &op.request {
                Some(Request::RequestRange(range)) => check_range(state, range)?,
                Some(Request::RequestPut(put)) => {
                    self.check_put(put, leases)?;
                    let keeps = put.ignore_value || put.ignore_lease;
                    if keeps && checks.deleted.iter().any(|range| range.contains(&put.key)) {
                        return Err(Error::KeyNotFound);
                    }
                    checks.looks += u64::from(keeps || put.prev_kv);
                }
                Some(Request::RequestTxn(txn)) => {
                    let branch = nested.next().expect("one for each nested transaction");
                    self.check(state, txn, branch, leases, checks)?;
                }
                Some(Request::RequestDeleteRange(r)) => checks.deleted.push(KeyRange::new(&r.key, &r.range_end)),
                None => {}
            }
        }
        Ok(())
    }

    /// Runs the selected branch. Fails only if storage does.
    fn execute(
        &mut self,
        write: &mut Write,
        req: &TxnRequest,
        branch: &Branch,
        leases: &mut dyn Leases,
    ) -> Result<TxnResponse, Error> {
        let mut nested = branch.nested.iter();
        let mut responses = Vec::with_capacity(branch.ops(req).len());
        for op in branch.ops(req) {
            let response = match &op.request {
                Some(Request::RequestRange(range)) => {
                    self.tally.ranges += 1;
                    write.operations += 1;
                    let rows = self.rows();
                    Some(Response::ResponseRange(self.state(write.revision(), &rows).range(range)?))
                }
                Some(Request::RequestPut(put)) => Some(Response::ResponsePut(self.put_in(write, put, leases)?)),
                Some(Request::RequestDeleteRange(delete)) => {
                    Some(Response::ResponseDeleteRange(self.delete_range_in(write, delete, leases)?))
                }
                Some(Request::RequestTxn(txn)) => {
                    let branch = nested.next().expect("one for each nested transaction");
                    Some(Response::ResponseTxn(self.execute(write, txn, branch, leases)?))
                }
                // Refused before it is proposed (KV-60).
                None => None,
            };
            responses.push(ResponseOp { response });
        }
        // A nested answer keeps this empty header (KV-70).
        Ok(TxnResponse { header: Some(ResponseHeader::default()), succeeded: branch.succeeded, responses })
    }
}

/// What [`Store::check`] carries along.
struct Checks<'r> {
    /// What the operations so far delete: a put that keeps a part of its record cannot have it from there. Structure
    /// checks refuse such pairs before they are replicated, but for deletes from a key on (KV-65).
    deleted: Vec<KeyRange<'r>>,
    /// Records looked up.
    looks: u64,
}

/// A range inside a transaction may name any revision that is readable before it. Unlike in a range of its own, a
/// negative number counts as a revision (KV-57).
fn check_range(state: &State<'_>, range: &RangeRequest) -> Result<(), Error> {
    match range.revision {
        0 => Ok(()),
        r if r > state.revision => Err(Error::FutureRev),
        r if r < state.compact_revision => Err(Error::Compacted),
        _ => Ok(()),
    }
}

/// What the compares decided, for a transaction and the nested ones that will run.
struct Branch {
    succeeded: bool,
    /// Compares that were looked at, nested ones included.
    compared: u64,
    /// For each nested transaction of the selected branch, in order.
    nested: Vec<Branch>,
}

impl Branch {
    fn select(state: &State<'_>, req: &TxnRequest) -> Result<Self, Error> {
        let mut branch = Branch { succeeded: true, compared: 0, nested: Vec::new() };
        for compare in &req.compare {
            branch.compared += 1;
            if !holds(state, compare)? {
                branch.succeeded = false;
                break;
            }
        }
        for op in branch.ops(req) {
            if let Some(Request::RequestTxn(txn)) = &op.request {
                let nested = Branch::select(state, txn)?;
                branch.compared += nested.compared;
                branch.nested.push(nested);
            }
        }
        Ok(branch)
    }

    fn ops<'r>(&self, req: &'r TxnRequest) -> &'r [RequestOp] {
        if self.succeeded { &req.success } else { &req.failure }
    }
}

/// Whether `compare` holds for every key of its range; a range without keys is judged like one absent key.
fn holds(state: &State<'_>, compare: &Compare) -> Result<bool, Error> {
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let mut metas: Vec<KeyMeta> = Vec::new();
    if range.is_single() {
        metas.extend(state.index.get(&compare.key, i64::MAX));
    } else if !range.is_empty() {
        let mut too_long = false;
        state.index.visit(range, i64::MAX, &mut |_, meta| {
            metas.push(meta);
            too_long = !state.may_look(0);
            !too_long
        });
        if too_long {
            return Err(Error::TooLong);
        }
    }
    if metas.is_empty() {
        return Ok(compare.target != CompareTarget::Value as i32 && verdict(compare, 0.cmp(&number(compare))));
    }
    for meta in metas {
        let ordering = match CompareTarget::try_from(compare.target) {
            Ok(CompareTarget::Version) => meta.version.cmp(&number(compare)),
            Ok(CompareTarget::Create) => meta.created.cmp(&number(compare)),
            Ok(CompareTarget::Mod) => meta.modified.main.cmp(&number(compare)),
            Ok(CompareTarget::Lease) => decode(&state.rows.row(meta.modified)?)?.lease.cmp(&number(compare)),
            Ok(CompareTarget::Value) => {
                let wanted = match &compare.target_union {
                    Some(TargetUnion::Value(value)) => &value[..],
                    _ => &[],
                };
                decode(&state.rows.row(meta.modified)?)?.value[..].cmp(wanted)
            }
            Err(_) => std::cmp::Ordering::Equal,
        };
        if !verdict(compare, ordering) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The number compared with; 0 unless the message carries one for its own target (KV-52).
fn number(compare: &Compare) -> i64 {
    match (CompareTarget::try_from(compare.target), &compare.target_union) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(n)))
        | (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(n)))
        | (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(n)))
        | (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(n))) => *n,
        _ => 0,
    }
}

fn verdict(compare: &Compare, ordering: std::cmp::Ordering) -> bool {
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        // KV-54.
        Err(_) => true,
    }
}
