//! Makes an OCI image of one static program.
//!
//! The same program and options give the same bytes: no time, host name or user of the packer enters the archive,
//! so a digest can be compared across machines.

use bulkhead_proto::Digest;
use serde_json::json;

use super::{elf, media};
use crate::refusal::{Code, Refusal};

/// Unprivileged by default: `nobody` is shared by other software, this number is not.
const USER: &str = "65532:65532";
/// Where the program stands in the image.
const FOLDER: &str = "bin";

/// What the image says beside its program.
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// The program's file name in the image.
    pub program_name: String,
    /// The image's name inside the layout.
    pub reference: Option<String>,
    /// Replaces the default entry point, the program itself.
    pub entrypoint: Vec<String>,
    /// `NAME=value` each.
    pub environment: Vec<String>,
    /// `uid[:gid]` instead of the unprivileged default.
    pub user: Option<String>,
}

/// An image in memory: one tar of an OCI layout, and its name by content.
#[derive(Debug)]
pub struct Packed {
    /// The layout as a tar.
    pub archive: Vec<u8>,
    /// Digest of the manifest.
    pub manifest: Digest,
}

/// Packs `program`; refuses what could not run alone.
pub fn pack(program: &[u8], options: &PackOptions) -> Result<Packed, Refusal> {
    let architecture = elf::static_architecture(program).map_err(|reason| {
        let help = "link it statically: a musl target, or -C target-feature=+crt-static";
        Refusal::new(Code::NotStaticProgram, &options.program_name, reason, help)
    })?;
    let name = &options.program_name;
    if name.is_empty() || name.len() > 90 || name.contains(['/', '\0']) || matches!(name.as_str(), "." | "..")
    {
        let help = "rename the file: at most 90 bytes, no '/'";
        return Err(Refusal::new(
            Code::BadField,
            "program",
            format!("'{name}' is no file name"),
            help,
        ));
    }

    let path = format!("{FOLDER}/{name}");
    let layer = archive(&[Entry::Folder(FOLDER), Entry::Program(&path, program)])?;
    let entrypoint = match options.entrypoint.as_slice() {
        [] => vec![format!("/{path}")],
        given => given.to_vec(),
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": entrypoint,
            "Env": options.environment,
            "User": options.user.as_deref().unwrap_or(USER),
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer).to_string()] },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media::MANIFEST,
        "config": descriptor(media::CONFIG, config.as_bytes()),
        "layers": [descriptor(media::LAYER, &layer)],
    })
    .to_string();
    let mut listed = descriptor(media::MANIFEST, manifest.as_bytes());
    listed["platform"] = json!({ "architecture": architecture, "os": "linux" });
    if let Some(reference) = &options.reference {
        listed["annotations"] = json!({ media::REF_NAME: reference });
    }
    let index = json!({ "schemaVersion": 2, "mediaType": media::INDEX, "manifests": [listed] }).to_string();

    let blob = |content: &[u8]| format!("blobs/sha256/{}", Digest::of(content).hex());
    let archive = archive(&[
        Entry::File("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        Entry::File("index.json", index.as_bytes()),
        Entry::Folder("blobs"),
        Entry::Folder("blobs/sha256"),
        Entry::File(&blob(manifest.as_bytes()), manifest.as_bytes()),
        Entry::File(&blob(config.as_bytes()), config.as_bytes()),
        Entry::File(&blob(&layer), &layer),
    ])?;
    Ok(Packed {
        archive,
        manifest: Digest::of(manifest.as_bytes()),
    })
}

fn descriptor(media_type: &str, content: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": Digest::of(content).to_string(), "size": content.len() })
}

enum Entry<'a> {
    Folder(&'a str),
    File(&'a str, &'a [u8]),
    Program(&'a str, &'a [u8]),
}

fn archive(entries: &[Entry<'_>]) -> Result<Vec<u8>, Refusal> {
    let refuse = |e: std::io::Error| {
        Refusal::new(
            Code::BadField,
            "archive",
            e.to_string(),
            "give the program a shorter, plain name",
        )
    };
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let (path, content, kind, mode): (&str, &[u8], _, _) = match entry {
            Entry::Folder(path) => (path, &[], tar::EntryType::Directory, 0o755),
            Entry::File(path, content) => (path, content, tar::EntryType::Regular, 0o644),
            Entry::Program(path, content) => (path, content, tar::EntryType::Regular, 0o755),
        };
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).map_err(refuse)?;
    }
    tar.into_inner().map_err(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::elf::tests::program;

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        let options = PackOptions {
            program_name: "web".into(),
            ..Default::default()
        };
        let (one, two) = (pack(&program(&[1]), &options), pack(&program(&[1]), &options));
        let (one, two) = (one.expect("a static program"), two.expect("a static program"));
        assert_eq!(one.archive, two.archive);
        let other = PackOptions {
            user: Some("0".into()),
            ..options
        };
        assert_ne!(
            pack(&program(&[1]), &other).expect("a static program").manifest,
            one.manifest
        );
    }

    #[test]
    fn what_needs_libraries_or_has_a_strange_name_is_refused() {
        let named = |name: &str| PackOptions {
            program_name: name.into(),
            ..Default::default()
        };
        let code = |file: &[u8], name| pack(file, &named(name)).map(|_| ()).map_err(|e| e.code());
        assert_eq!(code(&program(&[3]), "web"), Err(Code::NotStaticProgram));
        for name in ["", "..", "a/b"] {
            assert_eq!(code(&program(&[1]), name), Err(Code::BadField), "{name}");
        }
    }
}
