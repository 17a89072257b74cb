//! Refusals that need no look at the state: made before a request goes anywhere (G-16).

use std::collections::BTreeSet;

use tonic::Status;

use super::status;
use crate::{
    mvcc::KeyRange,
    pb::etcdserverpb::{
        DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
        range_request::{SortOrder, SortTarget},
        request_op::Request,
    },
};

pub fn range(req: &RangeRequest) -> Result<(), Status> {
    if req.key.is_empty() {
        return Err(status::empty_key());
    }
    // KV-23
    if SortOrder::try_from(req.sort_order).is_err() || SortTarget::try_from(req.sort_target).is_err() {
        return Err(status::bad_sort());
    }
    Ok(())
}

/// KV-30, KV-38: a stream is in key order and unfiltered.
pub fn range_stream(req: &RangeRequest) -> Result<(), Status> {
    let natural =
        matches!((req.sort_order(), req.sort_target()), (SortOrder::None | SortOrder::Ascend, SortTarget::Key));
    if !natural {
        return Err(Status::unimplemented("RangeStream does not support custom sort orders"));
    }
    let filters = [req.min_mod_revision, req.max_mod_revision, req.min_create_revision, req.max_create_revision];
    if filters.iter().any(|f| *f != 0) {
        return Err(Status::unimplemented("RangeStream does not support revision filters"));
    }
    Ok(())
}

/// KV-41.
pub fn put(req: &PutRequest) -> Result<(), Status> {
    if req.key.is_empty() {
        return Err(status::empty_key());
    }
    if req.ignore_value && !req.value.is_empty() {
        return Err(status::value_provided());
    }
    if req.ignore_lease && req.lease != 0 {
        return Err(status::lease_provided());
    }
    Ok(())
}

pub fn delete_range(req: &DeleteRangeRequest) -> Result<(), Status> {
    if req.key.is_empty() { Err(status::empty_key()) } else { Ok(()) }
}

pub fn txn(req: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    txn_shape(req, max_ops)?;
    // After everything else, the success list first.
    let mut seen = Touched::default();
    seen.list(&req.success)?;
    let mut seen = Touched::default();
    seen.list(&req.failure)
}

/// KV-60, KV-61: both branches at every depth.
fn txn_shape(req: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    let longest = req.compare.len().max(req.success.len()).max(req.failure.len());
    if longest > max_ops {
        return Err(status::too_many_ops());
    }
    if req.compare.iter().any(|c| c.key.is_empty()) {
        return Err(status::empty_key());
    }
    for op in req.success.iter().chain(&req.failure) {
        match &op.request {
            Some(Request::RequestRange(r)) => range(r)?,
            Some(Request::RequestPut(r)) => put(r)?,
            Some(Request::RequestDeleteRange(r)) => delete_range(r)?,
            Some(Request::RequestTxn(r)) => txn_shape(r, max_ops - longest)?,
            None => return Err(status::key_not_found()),
        }
    }
    Ok(())
}

/// What the operations of one list put and delete, nested transactions included (KV-62 to KV-65).
#[derive(Default)]
struct Touched<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Vec<KeyRange<'a>>,
}

impl<'a> Touched<'a> {
    /// Adds a list: its deletes first, then nested transactions, then its puts, each against what is there.
    fn list(&mut self, ops: &'a [RequestOp]) -> Result<(), Status> {
        for op in ops {
            if let Some(Request::RequestDeleteRange(r)) = &op.request {
                self.deletes.push(KeyRange::new(&r.key, &r.range_end));
            }
        }
        for op in ops {
            if let Some(Request::RequestTxn(nested)) = &op.request {
                self.nested(nested)?;
            }
        }
        for op in ops {
            if let Some(Request::RequestPut(r)) = &op.request {
                self.put(&r.key)?;
            }
        }
        Ok(())
    }

    /// A nested transaction's branches may repeat each other's puts, but not what was put before it in this list
    /// or lies in a delete known so far.
    fn nested(&mut self, nested: &'a TxnRequest) -> Result<(), Status> {
        let mut success = Touched::default();
        success.list(&nested.success)?;
        let mut failure = Touched::default();
        failure.list(&nested.failure)?;
        let puts: BTreeSet<&[u8]> = success.puts.union(&failure.puts).copied().collect();
        for key in puts {
            self.put(key)?;
        }
        self.deletes.append(&mut success.deletes);
        self.deletes.append(&mut failure.deletes);
        Ok(())
    }

    fn put(&mut self, key: &'a [u8]) -> Result<(), Status> {
        // KV-65: a delete with range_end "\0" is compared as the plain interval [key, "\0"), which holds nothing.
        let deleted = self.deletes.iter().any(|range| match range.is_single() {
            true => range.key == key,
            false => key >= range.key && key < range.end,
        });
        if deleted || !self.puts.insert(key) {
            return Err(status::duplicate_key());
        }
        Ok(())
    }
}
