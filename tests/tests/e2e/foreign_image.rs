//! Images of other tools run: umoci makes one of Debian's static busybox, skopeo copies it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::{Answer, Lab, eventually, installed, may_run};

const PROGRAMS: [&str; 2] = ["umoci", "busybox"];

#[test]
fn an_image_of_another_tool_runs() {
    if !may_run() || !PROGRAMS.iter().all(|program| installed(program)) {
        return;
    }
    let lab = Lab::up(1, 1);
    let layout = lab.folder().join("layout");
    build(lab.folder(), &layout);
    lab.ok(&format!("image load {} -t busybox:1", layout.display()));
    // The entry point and the environment that umoci wrote.
    lab.ok("service create -d --name web --publish 8080:8000 busybox:1");
    let page = eventually("it answers", || lab.get("worker-1", 8080, "/index.html"));
    assert_eq!(page, "made by another tool\n");

    lab.ok("service create -d --name says --restart-condition none busybox:1 -- /bin/sh -c /say");
    eventually("its log says that it ran", || {
        let log = lab.ok("service logs says");
        log.contains("hello from sh as 65532").then_some(()).ok_or(log)
    });

    if installed("skopeo") {
        let tar = lab.folder().join("copied.tar");
        let copy = [
            "copy",
            "--insecure-policy",
            &format!("oci:{}:busybox", layout.display()),
        ];
        let to = format!("oci-archive:{}:busybox:2", tar.display());
        run(Command::new("skopeo")
            .args(copy)
            .arg(to)
            .env("TMPDIR", lab.folder()));
        lab.ok(&format!("image load {}", tar.display()));
        lab.ok("service update --image busybox:2 web");
        assert_eq!(
            lab.get("worker-1", 8080, "/index.html").as_deref(),
            Ok("made by another tool\n")
        );
    }
}

fn build(folder: &Path, layout: &Path) {
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    let (layout, bundle) = (layout.display().to_string(), folder.join("bundle"));
    let image = format!("{layout}:busybox");
    umoci(&["init", "--layout", &layout]);
    umoci(&["new", "--image", &image]);
    umoci(&["unpack", "--image", &image, &bundle.display().to_string()]);
    let root = bundle.join("rootfs");
    std::fs::create_dir_all(root.join("bin")).expect("its own folder");
    std::fs::create_dir_all(root.join("www")).expect("its own folder");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let busybox = std::env::split_paths(&path)
        .map(|folder| folder.join("busybox"))
        .find(|path| path.is_file());
    std::fs::copy(busybox.expect("installed"), root.join("bin/busybox")).expect("copied");
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("a link");
    std::fs::write(root.join("www/index.html"), "made by another tool\n").expect("written");
    let script = "#!/bin/sh\necho \"hello from sh as $(/bin/busybox id -u)\"\n";
    std::fs::write(root.join("say"), script).expect("written");
    std::fs::set_permissions(root.join("say"), std::fs::Permissions::from_mode(0o755)).expect("its own");
    umoci(&["repack", "--image", &image, &bundle.display().to_string()]);
    umoci(&[
        "config",
        "--image",
        &image,
        "--config.user",
        "65532:65532",
        "--config.entrypoint",
        "/bin/busybox",
        "--config.cmd",
        "httpd",
        "--config.cmd",
        "-f",
        "--config.cmd",
        "-p",
        "--config.cmd",
        "8000",
        "--config.cmd",
        "-h",
        "--config.cmd",
        "/www",
    ]);
}

fn run(command: &mut Command) {
    Answer::of(command, b"").success();
}
