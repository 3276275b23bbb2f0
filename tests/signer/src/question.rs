//! What a manager asks, from JSON to an order.

use anyhow::{Context as _, ensure};
use bulkhead_identity::Subject;
use bulkhead_identity::bundle::Root;
use bulkhead_identity::csr::PublicKey;
use bulkhead_identity::order::{Order, What};
use bulkhead_proto::ClusterId;
use data_encoding::{BASE64, HEXLOWER};
use serde::Deserialize;

#[derive(Deserialize)]
struct Question {
    version: u32,
    cluster: String,
    root: String,
    serial: String,
    not_before: i64,
    not_after: i64,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Kind {
    Leaf {
        node: String,
        role: String,
        public_key: String,
    },
    Cross {
        next_root: String,
    },
}

/// The id of the root's key that is to sign, and what it is to sign.
pub(crate) fn read(body: &[u8]) -> anyhow::Result<(String, Order)> {
    let asked: Question = serde_json::from_slice(body)?;
    ensure!(asked.version == 1, "this signer speaks version 1");
    let cluster: ClusterId = asked.cluster.parse().context("'cluster'")?;
    let what = match asked.kind {
        Kind::Leaf {
            node,
            role,
            public_key,
        } => What::Leaf {
            subject: Subject {
                cluster,
                node: node.parse().context("'node'")?,
                role: role.parse().context("'role'")?,
            },
            key: PublicKey::from_spki(&BASE64.decode(public_key.as_bytes())?).context("'public_key'")?,
        },
        Kind::Cross { next_root } => {
            What::Cross(Root::from_der(&BASE64.decode(next_root.as_bytes())?).context("'next_root'")?)
        }
    };
    let serial = HEXLOWER.decode(asked.serial.as_bytes())?;
    let serial: [u8; 16] = serial.try_into().ok().context("'serial' has 16 bytes")?;
    ensure!((0x40..0x80).contains(&serial[0]), "'serial' begins with 4 to 7");
    let ms = |seconds: i64| seconds.checked_mul(1_000).context("a time out of range");
    let (from, to) = (ms(asked.not_before)?, ms(asked.not_after)?);
    Ok((asked.root, Order::with_serial(serial, what, from, to)))
}

/// An order on one line.
pub(crate) fn line(order: &Order) -> String {
    let what = match order.what() {
        What::Leaf { subject, key } => format!("{} {} key {}", subject.role, subject.node, key.key_id()),
        What::Cross(next) => format!("the way to the root {}", next.key_id()),
    };
    let (serial, until) = (HEXLOWER.encode(&order.serial()), order.not_after_ms() / 1_000);
    format!("{what} serial {serial} until {until}")
}
