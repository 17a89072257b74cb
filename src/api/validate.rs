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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcdserverpb::Compare;

    const MAX_OPS: usize = 4;

    fn p(key: &'static str) -> RequestOp {
        op(Request::RequestPut(PutRequest { key: key.into(), ..Default::default() }))
    }

    fn g(key: &'static str) -> RequestOp {
        op(Request::RequestRange(RangeRequest { key: key.into(), ..Default::default() }))
    }

    fn d(key: &'static str, range_end: &'static str) -> RequestOp {
        let request = DeleteRangeRequest { key: key.into(), range_end: range_end.into(), ..Default::default() };
        op(Request::RequestDeleteRange(request))
    }

    fn t(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
        op(Request::RequestTxn(both(success, failure)))
    }

    fn op(request: Request) -> RequestOp {
        RequestOp { request: Some(request) }
    }

    fn both(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
        TxnRequest { compare: Vec::new(), success, failure }
    }

    fn compares(n: usize) -> Vec<Compare> {
        vec![Compare { key: "k".into(), ..Default::default() }; n]
    }

    /// The text of a refusal, without the prefix; empty if there is none.
    fn said(outcome: Result<(), Status>) -> String {
        outcome.map_or_else(|e| e.message().trim_start_matches("etcdserver: ").to_owned(), |()| String::new())
    }

    fn checked(success: Vec<RequestOp>) -> String {
        let as_failure = said(txn(&both(Vec::new(), success.clone()), 128));
        let as_success = said(txn(&both(success, Vec::new()), 128));
        assert_eq!(as_success, as_failure, "both lists have the same rules");
        as_success
    }

    const NO_KEY: &str = "key is not provided";
    const TOO_MANY: &str = "too many operations in txn request";
    const DUPLICATE: &str = "duplicate key given in txn request";

    // KV-10, KV-23
    #[test]
    fn ranges_need_a_key_and_a_known_order() {
        let request = |key: &'static str, sort_order, sort_target| RangeRequest {
            key: key.into(),
            sort_order,
            sort_target,
            ..Default::default()
        };
        assert_eq!(said(range(&request("", 0, 0))), NO_KEY);
        assert_eq!(said(range(&request("", 9, 9))), NO_KEY, "the key comes first");
        for order in 0..=2 {
            for target in 0..=4 {
                assert_eq!(said(range(&request("k", order, target))), "");
            }
        }
        for (order, target) in [(3, 0), (-1, 0), (0, 5), (0, -1), (i32::MAX, i32::MIN)] {
            assert_eq!(said(range(&request("k", order, target))), "invalid sort option");
        }
    }

    // KV-30, KV-38
    #[test]
    fn streams_are_in_key_order_and_unfiltered() {
        let natural = RangeRequest { key: "k".into(), limit: 3, keys_only: true, ..Default::default() };
        assert_eq!(said(range_stream(&natural)), "");
        assert_eq!(said(range_stream(&RangeRequest { sort_order: 1, ..natural.clone() })), "");
        let orders = [(2, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (2, 4)];
        for (sort_order, sort_target) in orders {
            let request = RangeRequest { sort_order, sort_target, ..natural.clone() };
            assert_eq!(said(range_stream(&request)), "RangeStream does not support custom sort orders");
        }
        let filters = [
            RangeRequest { min_mod_revision: 1, ..natural.clone() },
            RangeRequest { max_mod_revision: -1, ..natural.clone() },
            RangeRequest { min_create_revision: 1, ..natural.clone() },
            RangeRequest { max_create_revision: 1, ..natural.clone() },
        ];
        for request in filters {
            let refused = range_stream(&request).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::Unimplemented);
            assert_eq!(refused.message(), "RangeStream does not support revision filters");
        }
    }

    // KV-41
    #[test]
    fn puts_are_refused_in_the_order_of_the_fields() {
        let none = PutRequest { key: "k".into(), ..Default::default() };
        let value = PutRequest { ignore_value: true, value: "v".into(), ..none.clone() };
        let lease = PutRequest { ignore_lease: true, lease: -1, ..none.clone() };
        let all = PutRequest { ignore_lease: true, lease: 1, ..value.clone() };
        assert_eq!(said(put(&none)), "");
        assert_eq!(said(put(&PutRequest { ignore_value: true, ignore_lease: true, ..none })), "");
        assert_eq!(said(put(&PutRequest { key: "".into(), ..all.clone() })), NO_KEY);
        assert_eq!(said(put(&all)), "value is provided");
        assert_eq!(said(put(&value)), "value is provided");
        assert_eq!(said(put(&lease)), "lease is provided");
        assert_eq!(said(delete_range(&DeleteRangeRequest { range_end: "\0".into(), ..Default::default() })), NO_KEY);
    }

    // KV-60
    #[test]
    fn shape_is_checked_in_both_branches_at_every_depth() {
        let bad_sort =
            op(Request::RequestRange(RangeRequest { key: "k".into(), sort_target: 7, ..Default::default() }));
        let no_compare_key = TxnRequest { compare: vec![Compare::default()], ..Default::default() };
        let cases = [
            (g(""), NO_KEY),
            (p(""), NO_KEY),
            (d("", "\0"), NO_KEY),
            (op(Request::RequestTxn(no_compare_key)), NO_KEY),
            (bad_sort, "invalid sort option"),
            (RequestOp { request: None }, "key not found"),
        ];
        for (bad, expected) in cases {
            assert_eq!(checked(vec![bad.clone()]), expected);
            assert_eq!(checked(vec![g("a"), t(vec![p("b")], vec![t(vec![], vec![bad.clone()])])]), expected);
            // Before duplicates are looked for.
            assert_eq!(checked(vec![p("a"), p("a"), bad]), expected);
        }
    }

    // KV-61
    #[test]
    fn nested_transactions_share_the_longest_lists_remainder() {
        let gets = |n: usize| vec![g("k"); n];
        let said_of = |request: &TxnRequest| said(txn(request, MAX_OPS));
        for n in [MAX_OPS, MAX_OPS + 1] {
            let expected = if n > MAX_OPS { TOO_MANY } else { "" };
            assert_eq!(said_of(&both(gets(n), vec![])), expected);
            assert_eq!(said_of(&both(vec![], gets(n))), expected);
            assert_eq!(said_of(&TxnRequest { compare: compares(n), ..Default::default() }), expected);
        }
        // One of four is the nested one itself; two conditions beside it leave two.
        assert_eq!(said_of(&both(vec![t(gets(3), vec![])], vec![])), "");
        assert_eq!(said_of(&both(vec![t(gets(4), vec![])], vec![])), TOO_MANY);
        let beside = |n| TxnRequest { compare: compares(2), ..both(vec![], vec![t(vec![], gets(n))]) };
        assert_eq!(said_of(&beside(2)), "");
        assert_eq!(said_of(&beside(3)), TOO_MANY);
        // To the bottom: four deep is as far as it goes.
        let deep = |n: usize| (0..n).fold(gets(1), |inner, _| vec![t(inner, vec![])]);
        assert_eq!(said_of(&both(deep(3), vec![])), "");
        assert_eq!(said_of(&both(deep(4), vec![])), TOO_MANY);
        // Counted before keys are looked at.
        assert_eq!(said_of(&both(vec![g(""); 5], vec![])), TOO_MANY);
    }

    // KV-62, KV-66
    #[test]
    fn one_list_puts_a_key_once_and_not_in_what_it_deletes() {
        for list in [
            vec![p("a"), p("a")],
            vec![p("a"), d("a", "")],
            vec![d("a", ""), p("a")],
            vec![p("b"), d("a", "c")],
            vec![d("a", "c"), p("a")],
        ] {
            assert_eq!(checked(list.clone()), DUPLICATE, "{list:?}");
        }
        for list in [
            vec![p("a"), p("b"), d("c", ""), g("a")],
            vec![d("a", "c"), p("c")],
            vec![d("a", ""), p("a\0")],
            vec![d("a", ""), d("a", ""), d("a", "z")],
            // An interval that holds nothing.
            vec![d("c", "a"), p("b"), p("c")],
        ] {
            assert_eq!(checked(list.clone()), "", "{list:?}");
        }
        assert_eq!(said(txn(&both(vec![p("a")], vec![p("a"), d("b", "")]), 128)), "");
    }

    // KV-63, KV-64
    #[test]
    fn nested_lists_count_for_the_one_around_them() {
        for list in [
            vec![p("a"), t(vec![p("a")], vec![])],
            vec![t(vec![], vec![p("a")]), p("a")],
            vec![d("a", ""), t(vec![p("a")], vec![])],
            vec![t(vec![], vec![p("a")]), d("a", "b")],
            vec![t(vec![d("a", "b")], vec![]), p("a")],
            vec![p("a"), t(vec![t(vec![], vec![p("a")])], vec![])],
            vec![t(vec![p("a")], vec![]), t(vec![], vec![p("a")])],
            vec![t(vec![d("a", "")], vec![]), t(vec![p("a")], vec![])],
        ] {
            assert_eq!(checked(list.clone()), DUPLICATE, "{list:?}");
        }
        for list in [
            vec![t(vec![p("a")], vec![p("a")])],
            vec![t(vec![p("a")], vec![d("a", "")])],
            vec![t(vec![p("a")], vec![]), t(vec![d("a", "")], vec![])],
            vec![t(vec![d("a", "")], vec![]), d("a", "b")],
        ] {
            assert_eq!(checked(list.clone()), "", "{list:?}");
        }
    }

    // KV-65
    #[test]
    fn deletion_from_a_key_on_overlaps_nothing() {
        for list in
            [vec![d("a", "\0"), p("b")], vec![p("a"), d("a", "\0")], vec![t(vec![p("z")], vec![]), d("a", "\0")]]
        {
            assert_eq!(checked(list.clone()), "", "{list:?}");
        }
    }
}
