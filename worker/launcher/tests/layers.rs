//! Layers: what is refused, what they make together, and that they stay as they were.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bulkhead_launcher::message::{Compression, DiffId, RefusalCode, Reply, Request};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use support::{Layer, Node, diff_id, is_root};

fn long_name(name: &[u8]) -> Layer {
    // A GNU long name lets any bytes be a name.
    Layer::new()
        .raw(b"././@LongLink", name, |header| {
            header.set_entry_type(tar::EntryType::GNULongName)
        })
        .raw(b"x", b"", |_| {})
}

fn pax(records: &str) -> Layer {
    let record = |text: &str| {
        let length = (1..1_000)
            .find(|n| n.to_string().len() + 1 + text.len() + 1 == *n)
            .unwrap();
        format!("{length} {text}\n")
    };
    let content: String = records.split(';').map(record).collect();
    Layer::new()
        .raw(b"pax", content.as_bytes(), |header| {
            header.set_entry_type(tar::EntryType::XHeader)
        })
        .raw(b"x", b"12345", |_| {})
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let deep = vec!["d"; 130].join("/");
    let kind = |kind: tar::EntryType| Layer::new().raw(b"x", b"", move |header| header.set_entry_type(kind));
    let trailing = {
        let mut bytes = Layer::new().file("a", b"", 0o644).bytes();
        bytes.extend([1; 512]);
        bytes
    };
    let cut = Layer::new().file("a", &[1; 2_000], 0o644).bytes()[..1_024].to_vec();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("upwards", Layer::new().raw(b"../x", b"", |_| {}).bytes()),
        (
            "upwards inside",
            Layer::new().raw(b"a/../../x", b"", |_| {}).bytes(),
        ),
        ("absolute", Layer::new().raw(b"/etc/x", b"", |_| {}).bytes()),
        (
            "through a link",
            Layer::new().symlink("a", "/etc").file("a/x", b"", 0o644).bytes(),
        ),
        (
            "through a link upwards",
            Layer::new().symlink("a", "../..").file("a/x", b"", 0o644).bytes(),
        ),
        (
            "folder over a link",
            Layer::new().symlink("a", "/").folder("a/", 0o777).bytes(),
        ),
        (
            "file over a link",
            Layer::new().symlink("a", "/x").file("a", b"", 0o644).bytes(),
        ),
        (
            "hard link outside",
            Layer::new().hardlink("a", "../../../etc/passwd").bytes(),
        ),
        ("hard link to nothing", Layer::new().hardlink("a", "b").bytes()),
        (
            "hard link to a link",
            Layer::new()
                .symlink("b", "/etc/passwd")
                .hardlink("a", "b")
                .bytes(),
        ),
        (
            "one name twice",
            Layer::new().file("a", b"1", 0o644).file("a", b"2", 0o644).bytes(),
        ),
        (
            "one folder twice",
            Layer::new().folder("a", 0o755).folder("a", 0o700).bytes(),
        ),
        (
            "file in a file",
            Layer::new()
                .file("a", b"1", 0o644)
                .file("a/b", b"2", 0o644)
                .bytes(),
        ),
        ("newline in a name", long_name(b"a\nb").bytes()),
        ("zero in a name", long_name(b"a\0b").bytes()),
        ("part over 255", long_name(&[b'a'; 256]).bytes()),
        ("name over 4096", long_name(&b"abcdefg/".repeat(600)).bytes()),
        ("too deep", long_name(deep.as_bytes()).bytes()),
        ("two sizes", pax("size=3").bytes()),
        ("path twice", pax("path=a;path=b").bytes()),
        ("sparse by PAX", pax("GNU.sparse.major=1").bytes()),
        ("sparse", kind(tar::EntryType::GNUSparse).bytes()),
        ("character device", kind(tar::EntryType::Char).bytes()),
        ("block device", kind(tar::EntryType::Block).bytes()),
        ("pipe", kind(tar::EntryType::Fifo).bytes()),
        (
            "owner outside",
            Layer::new().raw(b"x", b"", |h| h.set_uid(65_536)).bytes(),
        ),
        ("owner beyond 32 bits", pax("uid=4294967296").bytes()),
        (
            "whiteout of nothing",
            Layer::new().file(".wh.", b"", 0o644).bytes(),
        ),
        (
            "whiteout upwards",
            Layer::new().file(".wh...", b"", 0o644).bytes(),
        ),
        (
            "whiteout of a whiteout",
            Layer::new().file(".wh..wh.x", b"", 0o644).bytes(),
        ),
        (
            "opaque root",
            Layer::new().file(".wh..wh..opq", b"", 0o644).bytes(),
        ),
        ("data after the end", trailing),
        ("cut off", cut),
        ("not an archive", vec![b'x'; 4_096]),
        ("empty", Vec::new()),
    ];
    for (name, bytes) in cases {
        let refusal = node
            .unpack_as(&bytes, diff_id(&bytes), Compression::None)
            .expect_err(name);
        assert_eq!(refusal.code, RefusalCode::HostileLayer, "{name}: {refusal}");
        assert!(!refusal.message.contains("/tmp/"), "{name}: {refusal}");
    }
    let left: Vec<_> = std::fs::read_dir(node.data().join("launcher/layers"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_bomb_is_stopped_at_its_limit() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    let mut bomb = zstd::Encoder::new(Vec::new(), 1).unwrap();
    bomb.write_all(header.as_bytes()).unwrap();
    bomb.write_all(&vec![0; 64 << 20]).unwrap();
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    let refusal = node
        .unpack_as(&bomb, diff_id(b""), Compression::Zstd)
        .unwrap_err();
    assert_eq!(refusal.code, RefusalCode::HostileLayer, "{refusal}");
}

#[test]
fn a_layer_is_what_its_digest_says_in_every_compression() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let tar = Layer::new().file("a", b"content", 0o4755).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    let wrong = diff_id(b"something else");
    let refusal = node.unpack_as(&gzip, wrong, Compression::Gzip).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::DigestMismatch);
    let mut digests = Vec::new();
    for (blob, compression) in [
        (&tar, Compression::None),
        (&gzip, Compression::Gzip),
        (&zstd, Compression::Zstd),
    ] {
        let record = node.unpack_as(blob, diff_id(&tar), compression).unwrap();
        assert_eq!((record.entries, record.bytes, record.masks), (1, 7, false));
        digests.push(record.tree_digest);
        let layers = node.data().join("launcher/layers");
        let file = layers.join(diff_id(&tar).hex()).join("root/a");
        let facts = std::fs::metadata(file).unwrap();
        assert_eq!((facts.uid(), facts.mode() & 0o7777), (0x7000_0000, 0o755));
        assert_eq!(
            node.ask(Request::RemoveLayer {
                diff_id: diff_id(&tar)
            })
            .unwrap()
            .0,
            Reply::Done
        );
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
}

#[test]
fn a_changed_layer_is_noticed_and_not_used() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let spec = node.spec(
        "changed",
        vec![Layer::scratch().file("data", b"good", 0o644)],
        &["log", "1"],
    );
    let verify = Request::VerifyLayer {
        diff_id: spec.layers[0].clone(),
    };
    assert!(node.ask(verify.clone()).is_ok());
    let file = node
        .data()
        .join("launcher/layers")
        .join(spec.layers[0].hex())
        .join("root/data");
    std::fs::write(file, b"evil").unwrap();
    assert_eq!(node.ask(verify).unwrap_err().code, RefusalCode::DigestMismatch);
    assert_eq!(
        node.start_task(&spec).unwrap_err().code,
        RefusalCode::DigestMismatch
    );
    // Also by a launcher that has not seen the change happen.
    node.kill_and_restart();
    assert_eq!(
        node.start_task(&spec).unwrap_err().code,
        RefusalCode::DigestMismatch
    );
}

#[test]
fn upper_layers_replace_and_hide_what_is_below() {
    if !is_root() {
        return;
    }
    let mut node = Node::start();
    let base = Layer::scratch()
        .folder("etc", 0o755)
        .file("etc/passwd", b"old:x:1:1::/:/\n", 0o644)
        .file("gone", b"", 0o644)
        .folder("opaque", 0o755)
        .file("opaque/below", b"", 0o644);
    let top = Layer::new()
        .folder("etc", 0o755)
        .file("etc/passwd", b"new:x:2:2::/:/\n", 0o644)
        .file(".wh.gone", b"", 0o644)
        .folder("opaque", 0o755)
        .file("opaque/.wh..wh..opq", b"", 0o644)
        .folder("opaque/inside", 0o755);
    let mut spec = node.spec("stack", vec![base, top], &["inspect"]);
    spec.user = "new".into();
    spec.workdir = "/opaque/inside".into();
    assert_eq!(node.inspect_inside(&spec)["status"]["Uid"], "2 2 2 2");
    node.remove(&spec.task).unwrap();
    for (user, workdir) in [("old", "/"), ("", "/gone"), ("", "/opaque/below")] {
        let mut spec = spec.clone();
        (spec.user, spec.workdir) = (user.into(), workdir.into());
        assert_eq!(
            node.start_task(&spec).unwrap_err().code,
            RefusalCode::Invalid,
            "{user} {workdir}"
        );
    }
}

#[test]
fn a_blob_of_another_size_is_refused() {
    if !is_root() {
        return;
    }
    use bulkhead_launcher::message::UnpackLayer;
    let mut node = Node::start();
    let file = tempfile::tempfile().unwrap();
    let id: DiffId = diff_id(b"");
    let layer = UnpackLayer {
        diff_id: id,
        compression: Compression::None,
        size: 5,
    };
    let asked = node.send(Request::UnpackLayer(layer), &[&file.into()]);
    assert_eq!(node.reply(asked).unwrap_err().code, RefusalCode::Invalid);
}
