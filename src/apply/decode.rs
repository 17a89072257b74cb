//! A log entry's request, at whatever depth its transactions nest.
//!
//! The decoder stops at a depth of 100, which an entry reaches one level before the call it was made from, and which
//! members of another make do not know at all. What was logged must be readable for ever, so deep transactions are taken
//! apart by hand, down to where the decoder manages the rest.

use bytes::{Buf, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};

use crate::pb::etcdserverpb::{InternalRaftRequest, RequestOp, TxnRequest, request_op::Request};

/// Fields of the messages on the way down.
const TXN_OF_REQUEST: u32 = 6;
const SUCCESS: u32 = 2;
const FAILURE: u32 = 3;
const TXN_OF_OP: u32 = 4;
/// Each level costs at least one of the 128 operations a transaction may have.
const DEPTH_MAX: usize = 160;

pub fn request(data: &Bytes) -> Result<InternalRaftRequest, DecodeError> {
    InternalRaftRequest::decode(data.clone()).or_else(|e| {
        let (rest, txn) = split(data, &[TXN_OF_REQUEST])?;
        // Else it is not the depth.
        let [(_, txn)] = &txn[..] else { return Err(e) };
        let mut request = InternalRaftRequest::decode(rest)?;
        request.txn = Some(deep_txn(txn, DEPTH_MAX)?);
        Ok(request)
    })
}

fn deep_txn(data: &Bytes, levels: usize) -> Result<TxnRequest, DecodeError> {
    TxnRequest::decode(data.clone()).or_else(|e| {
        if levels == 0 {
            return Err(e);
        }
        let (rest, ops) = split(data, &[SUCCESS, FAILURE])?;
        let mut txn = TxnRequest::decode(rest)?;
        for (field, op) in ops {
            let list = if field == SUCCESS { &mut txn.success } else { &mut txn.failure };
            list.push(deep_op(&op, levels)?);
        }
        Ok(txn)
    })
}

fn deep_op(data: &Bytes, levels: usize) -> Result<RequestOp, DecodeError> {
    RequestOp::decode(data.clone()).or_else(|e| match &split(data, &[TXN_OF_OP])?.1[..] {
        [(_, txn)] => Ok(RequestOp { request: Some(Request::RequestTxn(deep_txn(txn, levels - 1)?)) }),
        _ => Err(e),
    })
}

/// The messages of some fields, and all that is not such a field.
type Split = (Bytes, Vec<(u32, Bytes)>);

fn split(data: &Bytes, fields: &[u32]) -> Result<Split, DecodeError> {
    let (mut left, mut rest, mut found) = (data.clone(), Vec::new(), Vec::new());
    while left.has_remaining() {
        let field = left.clone();
        let (tag, wire) = decode_key(&mut left)?;
        if fields.contains(&tag) && wire == WireType::LengthDelimited {
            let length = decode_varint(&mut left)?;
            if length > left.remaining() as u64 {
                return Err(TxnRequest::decode(&b"\x0a\x7f"[..]).expect_err("a message that is cut off"));
            }
            found.push((tag, left.split_to(length as usize)));
        } else {
            skip_field(wire, tag, &mut left, DecodeContext::default())?;
            rest.extend_from_slice(&field[..field.len() - left.len()]);
        }
    }
    Ok((rest.into(), found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::etcdserverpb::{Compare, PutRequest, RequestHeader};

    /// A put below so many transactions, in turn in the success and the failure list.
    fn nested(depth: usize) -> TxnRequest {
        let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        let mut op = RequestOp { request: Some(Request::RequestPut(put)) };
        for level in 0..depth {
            let compare = vec![Compare { key: format!("c{level}").into(), ..Default::default() }];
            let (success, failure) = if level % 2 == 0 { (vec![op], vec![]) } else { (vec![], vec![op]) };
            op = RequestOp { request: Some(Request::RequestTxn(TxnRequest { compare, success, failure })) };
        }
        match op.request {
            Some(Request::RequestTxn(txn)) => txn,
            _ => panic!("depth is at least 1"),
        }
    }

    #[test]
    fn whatever_was_logged_is_read_again() {
        for depth in [1, 47, 48, 49, 50, 51, 98, 127, 128] {
            let header = Some(RequestHeader { id: 7, ..Default::default() });
            let logged = InternalRaftRequest { header, txn: Some(nested(depth)), ..Default::default() };
            let bytes = Bytes::from(logged.encode_to_vec());
            assert_eq!(request(&bytes).as_ref(), Ok(&logged), "{depth}");
            // Every cut is an error, not a panic.
            for cut in (0..bytes.len()).step_by(7) {
                let _ = request(&bytes.slice(..cut));
            }
        }
    }

    #[test]
    fn a_depth_nobody_may_reach_is_refused_and_not_followed() {
        let mut bytes = Vec::new();
        for _ in 0..20_000 {
            let mut outer = Vec::new();
            prost::encoding::bytes::encode(
                SUCCESS,
                &{
                    let mut op = Vec::new();
                    prost::encoding::bytes::encode(TXN_OF_OP, &bytes, &mut op);
                    op
                },
                &mut outer,
            );
            bytes = outer;
            if bytes.len() > 60_000 {
                break;
            }
        }
        let mut logged = Vec::new();
        prost::encoding::bytes::encode(TXN_OF_REQUEST, &bytes, &mut logged);
        assert!(request(&logged.into()).is_err());
    }
}
