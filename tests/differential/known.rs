//! Every difference that is known and why it is one. Nothing else may differ.
//!
//! An entry takes exactly its difference out of a pair of answers; what remains is compared as usual. Whoever removes an
//! entry sees the requests it is for.

use actd::pb::etcdserverpb::{RangeRequest, RangeResponse};
use tonic::Code;

use crate::{
    answer::{Answer, Reply},
    generate::Request,
};

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum When {
    /// The reference is an etcd of release 3.4 and the subject is not.
    Reference34,
}

pub struct Known {
    pub statement: &'static str,
    pub reason: &'static str,
    pub when: When,
    /// Makes the two equal where they differ in this; whether it had to.
    pub align: fn(&Request, &mut Reply, &mut Reply) -> bool,
}

pub const KNOWN: &[Known] = &[Known {
    statement: "KV-29",
    reason: "RangeStream is new in 3.7",
    when: When::Reference34,
    align: |request, reference, subject| {
        let unknown = matches!(reference, Err(error) if error.code == Code::Unimplemented);
        let differs = matches!(request, Request::RangeStream(_)) && unknown && reference != subject;
        if differs {
            *reference = subject.clone();
        }
        differs
    },
}];

#[allow(dead_code)]
fn on_ranges(_: &RangeRequest, _: &RangeResponse) -> Option<Answer> {
    None
}
