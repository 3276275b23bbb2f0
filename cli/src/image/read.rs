//! Reads an OCI image layout, a folder or an uncompressed tar, made by any tool, and believes none of it.
//!
//! The walk is index → manifest → config and layers; every size is checked before a byte is read for it and every
//! digest after. Content outside that walk is never looked at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bulkhead_proto::{Digest, limits};
use serde::Deserialize;
use sha2::Digest as _;

use super::media;
use crate::refusal::{Code, Refusal};

/// Entries of an archive. A layout has a handful beside its layers; this bounds the index that is kept in memory.
const ARCHIVE_ENTRIES: usize = 4_096;
/// Index in index (image-spec, image-index.md allows it): one level is what multi-platform images use.
const INDEX_DEPTH: usize = 2;
/// What a cluster of these programs can run.
const ARCHITECTURE: &str = "amd64";

/// A descriptor (image-spec, descriptor.md), with the fields that are used.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct IndexFile {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct ManifestFile {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct ConfigFile {
    architecture: String,
    os: String,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// A blob whose content was read whole and matched its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedBlob {
    /// Its name by content.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
}

/// An image whose every blob was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The name inside the layout, where it has one.
    pub reference: Option<String>,
    /// The manifest itself.
    pub manifest: VerifiedBlob,
    /// The configuration.
    pub config: VerifiedBlob,
    /// The layers, lowest first.
    pub layers: Vec<VerifiedBlob>,
}

/// An opened layout.
#[derive(Debug)]
pub struct Layout {
    name: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Folder(PathBuf),
    /// Where each regular file of the tar begins, and its size.
    Archive(File, BTreeMap<String, (u64, u64)>),
}

impl Layout {
    /// Opens a layout folder or tar.
    pub fn open(path: &Path) -> Result<Self, Refusal> {
        let name = path.display().to_string();
        let unreadable =
            |e: std::io::Error| Refusal::new(Code::Unreadable, &name, e.to_string(), "check the path");
        let folder = path.metadata().map_err(unreadable)?.is_dir();
        let content = if folder {
            Content::Folder(path.to_owned())
        } else {
            let file = File::open(path).map_err(unreadable)?;
            let entries = index_archive(&file, &name)?;
            Content::Archive(file, entries)
        };
        Ok(Self { name, content })
    }

    /// Finds the image called `wanted` (or the only one), reads all its blobs and checks them.
    pub fn verify(&self, wanted: Option<&str>) -> Result<Manifest, Refusal> {
        let marker = self.whole("oci-layout", limits::MANIFEST_BYTES as u64)?;
        let version: serde_json::Value = self.json("oci-layout", &marker)?;
        if version["imageLayoutVersion"] != "1.0.0" {
            return Err(self.no_layout("'oci-layout' is not of version 1.0.0"));
        }
        let index = self.whole("index.json", limits::MANIFEST_BYTES as u64)?;
        let index: IndexFile = self.json("index.json", &index)?;
        let chosen = choose(&self.name, &index.manifests, wanted)?;
        let reference = chosen.annotations.get(media::REF_NAME).cloned();
        let listed = self.resolve(chosen.clone(), INDEX_DEPTH)?;

        let (manifest, bytes) = self.document(&listed)?;
        let parsed: ManifestFile = self.json("manifest", &bytes)?;
        let unsupported =
            |reason: String, help: &str| Err(Refusal::new(Code::UnsupportedImage, &self.name, reason, help));
        if parsed.config.media_type != media::CONFIG {
            return unsupported(
                format!("its config is a '{}'", parsed.config.media_type),
                "load a container image in OCI format: skopeo copy … oci:FOLDER:NAME converts",
            );
        }
        if parsed.layers.len() > limits::IMAGE_LAYERS {
            let reason = format!(
                "{} layers; the limit is {}",
                parsed.layers.len(),
                limits::IMAGE_LAYERS
            );
            return unsupported(reason, "squash the image");
        }
        if let Some(odd) = parsed
            .layers
            .iter()
            .find(|l| !media::LAYERS.contains(&l.media_type.as_str()))
        {
            let reason = format!("a layer is a '{}'", odd.media_type);
            return unsupported(reason, "layers are tar, tar+gzip or tar+zstd");
        }
        let (config, bytes) = self.document(&parsed.config)?;
        let about: ConfigFile = self.json("config", &bytes)?;
        if about.os != "linux" || about.architecture != ARCHITECTURE {
            let reason = format!("it is for {}/{}", about.os, about.architecture);
            return unsupported(reason, "load an image for linux/amd64");
        }
        let diff_ids = &about.rootfs.diff_ids;
        let named = diff_ids.iter().all(|id| id.parse::<Digest>().is_ok());
        if diff_ids.len() != parsed.layers.len() || !named {
            let reason = "its config does not name each layer's content by SHA-256".into();
            return unsupported(reason, "build the image again");
        }
        let layers: Result<_, _> = parsed.layers.iter().map(|layer| self.checked(layer)).collect();
        Ok(Manifest {
            reference,
            manifest,
            config,
            layers: layers?,
        })
    }

    /// Follows an index of platforms to the manifest for this cluster.
    fn resolve(&self, descriptor: Descriptor, depth: usize) -> Result<Descriptor, Refusal> {
        match descriptor.media_type.as_str() {
            media::MANIFEST => Ok(descriptor),
            media::INDEX if depth > 0 => {
                let (_, bytes) = self.document(&descriptor)?;
                let index: IndexFile = self.json("index", &bytes)?;
                let fits = |p: &Platform| p.os == "linux" && p.architecture == ARCHITECTURE;
                let found = index
                    .manifests
                    .into_iter()
                    .find(|d| d.platform.as_ref().is_some_and(fits));
                let found = found.ok_or_else(|| {
                    let reason = "it has no manifest for linux/amd64";
                    Refusal::new(
                        Code::UnsupportedImage,
                        &self.name,
                        reason,
                        "build it for linux/amd64",
                    )
                })?;
                self.resolve(found, depth - 1)
            }
            other => {
                let reason = format!("index.json lists a '{other}' where a manifest is due");
                let help = "convert it to OCI format: skopeo copy … oci:FOLDER:NAME";
                Err(Refusal::new(Code::UnsupportedImage, &self.name, reason, help))
            }
        }
    }

    /// A small blob in memory, checked.
    fn document(&self, descriptor: &Descriptor) -> Result<(VerifiedBlob, Vec<u8>), Refusal> {
        let digest = self.digest(descriptor)?;
        let path = format!("blobs/sha256/{}", digest.hex());
        if descriptor.size > limits::MANIFEST_BYTES as u64 {
            let reason = format!(
                "{digest} has {} bytes; the limit is {}",
                descriptor.size,
                limits::MANIFEST_BYTES
            );
            return Err(Refusal::new(
                Code::UnsupportedImage,
                &self.name,
                reason,
                "build the image again",
            ));
        }
        let bytes = self.whole(&path, descriptor.size)?;
        if bytes.len() as u64 != descriptor.size || Digest::of(&bytes) != digest {
            return Err(self.damaged(&digest));
        }
        Ok((
            VerifiedBlob {
                digest,
                size: descriptor.size,
            },
            bytes,
        ))
    }

    /// A blob of any size, read through once and checked.
    fn checked(&self, descriptor: &Descriptor) -> Result<VerifiedBlob, Refusal> {
        let digest = self.digest(descriptor)?;
        if descriptor.size > limits::BLOB_BYTES {
            let reason = format!(
                "{digest} has {} bytes; the limit is {}",
                descriptor.size,
                limits::BLOB_BYTES
            );
            return Err(Refusal::new(
                Code::UnsupportedImage,
                &self.name,
                reason,
                "make the layer smaller",
            ));
        }
        let (size, mut reader) = self.reader(&format!("blobs/sha256/{}", digest.hex()))?;
        if size != descriptor.size {
            return Err(self.damaged(&digest));
        }
        let mut hasher = sha2::Sha256::new();
        let mut chunk = vec![0; limits::CHUNK_BYTES];
        loop {
            let got = reader
                .read(&mut chunk)
                .map_err(|e| self.unreadable(&digest.to_string(), &e))?;
            if got == 0 {
                break;
            }
            hasher.update(&chunk[..got]);
        }
        if Digest::from_bytes(hasher.finalize().into()) != digest {
            return Err(self.damaged(&digest));
        }
        Ok(VerifiedBlob { digest, size })
    }

    fn whole(&self, path: &str, limit: u64) -> Result<Vec<u8>, Refusal> {
        let (size, reader) = self.reader(path)?;
        if size > limit {
            let reason = format!("'{path}' has {size} bytes where at most {limit} are due");
            return Err(Refusal::new(
                Code::DamagedBlob,
                &self.name,
                reason,
                "make the archive again",
            ));
        }
        let mut bytes = Vec::new();
        reader
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|e| self.unreadable(path, &e))?;
        Ok(bytes)
    }

    /// The content of a blob that was verified.
    pub fn blob(&self, blob: &VerifiedBlob) -> Result<impl Read + Send + 'static, Refusal> {
        Ok(self.reader(&format!("blobs/sha256/{}", blob.digest.hex()))?.1)
    }

    /// One regular file of the layout. Paths come from digests and constants, never from the layout's own text.
    fn reader(&self, path: &str) -> Result<(u64, Range), Refusal> {
        let (file, at, size) = match &self.content {
            Content::Folder(root) => {
                // Without O_NOFOLLOW a layout could name any file of the operator; O_NONBLOCK lets no pipe hang us.
                let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
                let file = File::options()
                    .read(true)
                    .custom_flags(flags)
                    .open(root.join(path))
                    .map_err(|e| self.missing(path, &e))?;
                let about = file.metadata().map_err(|e| self.unreadable(path, &e))?;
                if !about.is_file() {
                    return Err(self.no_layout(&format!("'{path}' is not a regular file")));
                }
                (file, 0, about.len())
            }
            Content::Archive(file, entries) => {
                let (start, size) = *entries
                    .get(path)
                    .ok_or_else(|| self.missing(path, &std::io::ErrorKind::NotFound.into()))?;
                let file = file.try_clone().map_err(|e| self.unreadable(path, &e))?;
                (file, start, size)
            }
        };
        Ok((size, Range { file, at, left: size }))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, what: &str, bytes: &[u8]) -> Result<T, Refusal> {
        serde_json::from_slice(bytes).map_err(|e| self.no_layout(&format!("{what}: {e}")))
    }

    fn digest(&self, descriptor: &Descriptor) -> Result<Digest, Refusal> {
        descriptor
            .digest
            .parse()
            .map_err(|e: bulkhead_proto::ids::ParseDigestError| {
                Refusal::new(
                    Code::UnsupportedImage,
                    &self.name,
                    e.to_string(),
                    "build it with SHA-256 digests",
                )
            })
    }

    fn damaged(&self, digest: &Digest) -> Refusal {
        let reason = format!("the content of {digest} has another digest or size");
        Refusal::new(
            Code::DamagedBlob,
            &self.name,
            reason,
            "fetch or build the image again",
        )
    }

    fn unreadable(&self, path: &str, cause: &std::io::Error) -> Refusal {
        Refusal::new(
            Code::Unreadable,
            &self.name,
            format!("'{path}': {cause}"),
            "check the disk and the path",
        )
    }

    fn missing(&self, path: &str, cause: &std::io::Error) -> Refusal {
        self.no_layout(&format!("'{path}': {cause}"))
    }

    fn no_layout(&self, reason: &str) -> Refusal {
        let help = "name a folder or an uncompressed tar in OCI layout: skopeo copy … oci-archive:FILE:NAME";
        Refusal::new(Code::NotOciLayout, &self.name, reason, help)
    }
}

/// A part of a file, read at its own place: clones of a descriptor share one.
struct Range {
    file: File,
    at: u64,
    left: u64,
}

impl Read for Range {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

/// The image that is meant: the one of that name, or the only one.
fn choose<'a>(
    place: &str,
    listed: &'a [Descriptor],
    wanted: Option<&str>,
) -> Result<&'a Descriptor, Refusal> {
    let name = |d: &'a Descriptor| d.annotations.get(media::REF_NAME).map(String::as_str);
    let names: Vec<&str> = listed.iter().filter_map(name).collect();
    let refuse = |reason: String| {
        let help = if names.is_empty() {
            "export one image alone".into()
        } else {
            format!("one of: {}", names.join(", "))
        };
        Err(Refusal::new(Code::AmbiguousImage, place, reason, help))
    };
    let fitting: Vec<&Descriptor> = listed
        .iter()
        .filter(|d| wanted.is_none_or(|wanted| name(d) == Some(wanted)))
        .collect();
    match (fitting.as_slice(), wanted) {
        ([one], _) => Ok(one),
        ([], Some(wanted)) => refuse(format!("it holds no image '{wanted}'")),
        ([], None) => refuse("it lists no image".into()),
        (several, _) => refuse(format!("it holds {} images", several.len())),
    }
}

/// Notes where each regular file of a tar begins. Links, devices and paths that climb are refused: no layout has any.
fn index_archive(file: &File, name: &str) -> Result<BTreeMap<String, (u64, u64)>, Refusal> {
    let refuse = |reason: String| {
        let help = "name an uncompressed tar in OCI layout: skopeo copy … oci-archive:FILE:NAME";
        Refusal::new(Code::NotOciLayout, name, reason, help)
    };
    let mut archive = tar::Archive::new(file);
    let mut files = BTreeMap::new();
    let entries = archive.entries_with_seek().map_err(|e| refuse(e.to_string()))?;
    for (count, entry) in entries.enumerate() {
        if count == ARCHIVE_ENTRIES {
            return Err(refuse(format!("it has more than {ARCHIVE_ENTRIES} entries")));
        }
        let entry = entry.map_err(|e| refuse(e.to_string()))?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.strip_prefix("./").unwrap_or(&path);
        match entry.header().entry_type() {
            tar::EntryType::Directory | tar::EntryType::XGlobalHeader => continue,
            tar::EntryType::Regular => {}
            other => return Err(refuse(format!("'{path}' is a {other:?}, not a file or folder"))),
        }
        if path.starts_with('/') || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(refuse(format!("'{path}' is not a plain relative path")));
        }
        if files
            .insert(path.to_owned(), (entry.raw_file_position(), entry.size()))
            .is_some()
        {
            return Err(refuse(format!("'{path}' is there twice")));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::elf::tests::program;
    use crate::image::{PackOptions, pack};

    fn packed() -> Vec<u8> {
        let options = PackOptions {
            program_name: "web".into(),
            reference: Some("web:1".into()),
            ..Default::default()
        };
        pack(&program(&[1]), &options).expect("a static program").archive
    }

    fn read(archive: &[u8], wanted: Option<&str>) -> Result<Manifest, Code> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("image.tar");
        std::fs::write(&path, archive).expect("the folder is writable");
        Layout::open(&path)
            .and_then(|layout| layout.verify(wanted))
            .map_err(|e| e.code())
    }

    #[test]
    fn what_was_packed_is_read_back_from_tar_and_folder() {
        let image = read(&packed(), None).expect("our own image");
        assert_eq!(image.reference.as_deref(), Some("web:1"));
        assert_eq!(image.layers.len(), 1);
        let folder = tempfile::tempdir().expect("a temporary folder");
        tar::Archive::new(packed().as_slice())
            .unpack(folder.path())
            .expect("our own archive");
        let again = Layout::open(folder.path()).and_then(|layout| layout.verify(Some("web:1")));
        assert_eq!(again, Ok(image));
    }

    #[test]
    fn an_image_of_another_name_is_not_taken() {
        assert_eq!(read(&packed(), Some("db:1")), Err(Code::AmbiguousImage));
    }

    #[test]
    fn a_flipped_bit_in_any_blob_is_found() {
        let archive = packed();
        let mut flipped = 0;
        for entry in tar::Archive::new(archive.as_slice())
            .entries()
            .expect("our own archive")
        {
            let entry = entry.expect("our own archive");
            if !entry.path_bytes().starts_with(b"blobs/sha256/") || entry.size() == 0 {
                continue;
            }
            let mut bad = archive.clone();
            let at = usize::try_from(entry.raw_file_position()).expect("small");
            bad[at] ^= 1;
            assert_eq!(read(&bad, None), Err(Code::DamagedBlob));
            flipped += 1;
        }
        assert_eq!(flipped, 3, "manifest, config and layer");
    }

    #[test]
    fn links_and_climbing_paths_are_refused() {
        let hostile = |kind, path: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_cksum();
            let mut tar = tar::Builder::new(Vec::new());
            tar.append(&header, std::io::empty()).expect("memory");
            tar.into_inner().expect("memory")
        };
        for (kind, path) in [
            (tar::EntryType::Symlink, &b"index.json"[..]),
            (tar::EntryType::Link, b"index.json"),
            (tar::EntryType::Char, b"index.json"),
            (tar::EntryType::Regular, b"../index.json"),
            (tar::EntryType::Regular, b"/index.json"),
        ] {
            assert_eq!(read(&hostile(kind, path), None), Err(Code::NotOciLayout));
        }
        assert_eq!(read(b"\x1f\x8bnot a tar", None), Err(Code::NotOciLayout));
    }

    #[test]
    fn a_link_in_a_folder_is_not_followed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        tar::Archive::new(packed().as_slice())
            .unpack(folder.path())
            .expect("our own archive");
        let (index, real) = (folder.path().join("index.json"), folder.path().join("real.json"));
        std::fs::rename(&index, &real).expect("same folder");
        std::os::unix::fs::symlink(&real, &index).expect("same folder");
        let read = Layout::open(folder.path()).and_then(|layout| layout.verify(None));
        assert_eq!(read.map_err(|e| e.code()), Err(Code::NotOciLayout));
    }

    /// A layout whose index.json points to an index of platforms, each pointing to the packed manifest.
    fn nested(platforms: &[&str], depth: usize) -> Result<Manifest, Code> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        tar::Archive::new(packed().as_slice())
            .unpack(folder.path())
            .expect("our own archive");
        let path = folder.path().join("index.json");
        let top = std::fs::read(&path).expect("it was packed");
        let mut top: serde_json::Value = serde_json::from_slice(&top).expect("it was packed");
        let manifest = top["manifests"][0].clone();
        let mut listed: Vec<_> = platforms
            .iter()
            .map(|architecture| {
                let mut entry = manifest.clone();
                entry["platform"]["architecture"] = (*architecture).into();
                entry
            })
            .collect();
        for _ in 0..depth {
            let index = serde_json::json!({ "schemaVersion": 2, "manifests": listed }).to_string();
            let digest = Digest::of(index.as_bytes());
            std::fs::write(folder.path().join("blobs/sha256").join(digest.hex()), &index).expect("writable");
            listed = vec![serde_json::json!({
                "mediaType": media::INDEX,
                "digest": digest.to_string(),
                "size": index.len(),
                "platform": { "architecture": ARCHITECTURE, "os": "linux" },
            })];
        }
        top["manifests"] = listed.into();
        std::fs::write(&path, top.to_string()).expect("writable");
        Layout::open(folder.path())
            .and_then(|layout| layout.verify(None))
            .map_err(|e| e.code())
    }

    #[test]
    fn an_index_of_platforms_is_followed_to_ours_and_no_deeper_than_needed() {
        assert!(nested(&["arm64", "amd64"], 1).is_ok());
        assert!(nested(&["amd64"], INDEX_DEPTH).is_ok());
        assert_eq!(nested(&["amd64"], INDEX_DEPTH + 1), Err(Code::UnsupportedImage));
        assert_eq!(nested(&["arm64"], 1), Err(Code::UnsupportedImage));
    }
}
