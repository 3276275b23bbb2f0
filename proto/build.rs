//! Compiles the protobuf files without `protoc`, and lists every method of every service as one enum, so that a match
//! over methods that misses one does not build.

use std::fmt::Write as _;
use std::path::PathBuf;

use prost::Message as _;

const FILES: [&str; 10] = [
    "object",
    "audit",
    "command",
    "enrolment",
    "dispatcher",
    "control",
    "local",
    "raft",
    "peer",
    "backup",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let files = FILES.map(|name| format!("proto/bulkhead/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    std::fs::write(out.join("methods.rs"), methods(&descriptors))?;
    tonic_prost_build::configure()
        .bytes("bulkhead.v1.RaftMessage.payload")
        .bytes("bulkhead.v1.BlobChunk.data")
        .bytes("bulkhead.v1.ForwardRequest.transaction")
        // What holds a secret in the clear gets a redacted `Debug` by hand.
        .skip_debug([
            "bulkhead.v1.AssignedSecret",
            "bulkhead.v1.CreateSecretRequest",
            "bulkhead.v1.EnrolRequest",
            "bulkhead.v1.CreateTicketResponse",
            "bulkhead.v1.JoinRequest",
            "bulkhead.v1.EnrolResponse",
            "bulkhead.v1.RenewResponse",
            "bulkhead.v1.InitResponse",
            "bulkhead.v1.UnlockRequest",
            "bulkhead.v1.GetUnlockKeyResponse",
            "bulkhead.v1.RotateRootRequest",
            "bulkhead.v1.RestoreOrder",
            "bulkhead.v1.BackupKey",
        ])
        .compile_fds(descriptors)?;
    Ok(())
}

fn methods(descriptors: &prost_types::FileDescriptorSet) -> String {
    let mut variants = String::new();
    let mut paths = String::new();
    let mut all = String::new();
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                let variant = format!("{}{}", service.name(), method.name());
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                let _ = writeln!(variants, "    /// `{path}`\n    {variant},");
                let _ = writeln!(paths, "            Method::{variant} => \"{path}\",");
                let _ = writeln!(all, "        Method::{variant},");
            }
        }
    }
    format!(
        "/// Every gRPC method of the product.\n\
         #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]\n\
         pub enum Method {{\n{variants}}}\n\n\
         impl Method {{\n    /// Every method, in the order of the descriptors.\n    pub const ALL: &'static [Method] = &[\n{all}    ];\n\n    \
         /// The method's path as HTTP/2 carries it.\n    pub const fn path(self) -> &'static str {{\n        match self {{\n{paths}        }}\n    }}\n}}\n"
    )
}
