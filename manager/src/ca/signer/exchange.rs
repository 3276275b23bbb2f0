//! One exchange with a signer: a connection of its own, one POST, one answer.

use std::convert::Infallible;

use bulkhead_identity::Identity;
use bulkhead_identity::bundle::Root;
use bulkhead_identity::order::{Order, What};
use bulkhead_identity::outside::{self, Anchor, Url};
use bulkhead_proto::limits;
use bulkhead_proto::wire::ExternalSigner;
use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use http::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};

use super::SignerError;

/// The version of the protocol, and the only one.
const VERSION: u32 = 1;
const JSON: &str = "application/json";
/// Characters of a refusal that are shown.
const SAID_CHARS: usize = 200;
/// Bytes of the headers of an answer.
const HEADER_BYTES: usize = 16 << 10;

/// What is asked. Its fields and their order are the document's.
#[derive(Debug, Serialize)]
struct Asked {
    version: u32,
    /// The cluster's id.
    cluster: String,
    /// The id of the root's key: SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
    root: String,
    serial: String,
    /// Seconds since 1970.
    not_before: i64,
    not_after: i64,
    #[serde(flatten)]
    what: AskedFor,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum AskedFor {
    Leaf {
        node: String,
        role: &'static str,
        /// SubjectPublicKeyInfo, DER, base64.
        public_key: String,
    },
    Cross {
        /// The root that follows, DER, base64.
        next_root: String,
    },
}

/// A good answer. What else is in it means nothing.
#[derive(Debug, Deserialize)]
struct Answered {
    certificate: String,
}

/// A refusal that says why.
#[derive(Debug, Deserialize)]
struct Refused {
    error: String,
}

fn asked(root: &Root, order: &Order) -> Asked {
    let what = match order.what() {
        What::Leaf { subject, key } => AskedFor::Leaf {
            node: subject.node.to_string(),
            role: subject.role.as_str(),
            public_key: BASE64.encode(key.spki_der()),
        },
        What::Cross(next) => AskedFor::Cross {
            next_root: BASE64.encode(next.der()),
        },
    };
    Asked {
        version: VERSION,
        cluster: root.cluster().to_string(),
        root: root.key_id().to_string(),
        serial: HEXLOWER.encode(&order.serial()),
        not_before: order.not_before_ms() / 1_000,
        not_after: order.not_after_ms() / 1_000,
        what,
    }
}

/// What the signer at this address sends for an order. The deadline is the caller's, and so is all judgement.
pub(super) async fn exchange(
    identity: &Identity,
    signer: &ExternalSigner,
    root: &Root,
    order: &Order,
) -> Result<Vec<u8>, SignerError> {
    let url: Url = signer.url.parse()?;
    let anchor = Anchor::from_der(&signer.ca)?;
    let body = serde_json::to_vec(&asked(root, order)).map_err(|_| SignerError::Format("the order"))?;
    let request = Request::post(url.path())
        .header(HOST, url.address())
        .header(CONTENT_TYPE, JSON)
        .header(ACCEPT, JSON)
        .header(CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))
        .map_err(|_| SignerError::Format("the address"))?;
    let stream = outside::open(identity, &url, &anchor).await?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEADER_BYTES)
        .handshake(TokioIo::new(stream))
        .await?;
    let answer = async {
        let response = sender.send_request(request).await?;
        Ok::<_, SignerError>((response.status(), read(response).await?))
    };
    let connection = async {
        // Why it ended, the answer says as well.
        let _ended = connection.await;
        std::future::pending::<Infallible>().await
    };
    // Both end with this exchange: whichever is dropped leaves nothing half done that anybody needs.
    let (status, body) = tokio::select! {
        biased;
        answer = answer => answer?,
        never = connection => match never {},
    };
    match status {
        StatusCode::OK => certificate(&body),
        other => Err(SignerError::Refused {
            status: other.as_u16(),
            said: said(&body),
        }),
    }
}

async fn read(response: Response<Incoming>) -> Result<Bytes, SignerError> {
    let body = Limited::new(response.into_body(), limits::SIGNER_ANSWER_BYTES).collect();
    match body.await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(SignerError::Long),
        Err(error) => Err(error
            .downcast::<hyper::Error>()
            .map_or(SignerError::Format("it ends early"), |error| {
                SignerError::Http(*error)
            })),
    }
}

fn certificate(body: &[u8]) -> Result<Vec<u8>, SignerError> {
    let answered: Answered = serde_json::from_slice(body)
        .map_err(|_| SignerError::Format("it is no JSON object with a text 'certificate'"))?;
    BASE64
        .decode(answered.certificate.as_bytes())
        .map_err(|_| SignerError::Format("'certificate' is not base64"))
}

/// A refusal's words: a stranger's, so they are cut, and on one line.
fn said(body: &[u8]) -> String {
    let said = serde_json::from_slice(body).map_or_else(|_| String::new(), |refused: Refused| refused.error);
    let said: String = said
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SAID_CHARS)
        .collect();
    match said.is_empty() {
        true => "it does not say why".to_owned(),
        false => said,
    }
}
